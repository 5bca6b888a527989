"""SHA-256 of every file of a folder, in the format of `sha256sum -c`.

Why SHA-256: it also names the content, processors compute it in hardware, and hashlib lets go of
the interpreter lock, so that files are hashed in parallel and in the background.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ppflow_jax.files.disk import atomic
from ppflow_jax.files.objects import StoreError

NAME = "SHA256SUMS"


def write(folder: Path, exempt: Collection[str] = ()) -> None:
    """Write `SHA256SUMS` for all files of `folder` but those whose relative path is `exempt`."""
    names = sorted(_files(folder) - set(exempt))
    with atomic(folder / NAME) as temporary:
        lines = [f"{value}  {name}\n" for name, value in zip(names, _hashes(folder, names))]
        temporary.write_text("".join(lines))


def read(folder: Path) -> dict[str, str]:
    """SHA-256 by relative path.

    Raises:
      ValueError: there is no `SHA256SUMS`, or it cannot be read.
    """
    try:
        lines = (folder / NAME).read_text().splitlines()
    except StoreError:
        raise
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{NAME} cannot be read: {type(e).__name__}") from e
    return {name: value for value, _, name in (line.partition("  ") for line in lines)}


def first_damaged(
    folder: Path, exempt: Collection[str] = (), part: int = 0, parts: int = 1
) -> int | None:
    """Index in `names(folder)` of a file that is not as it was written, or None.

    Only every `parts`-th file is read, from `part` on: hosts that share a folder share the work.

    Raises:
      ValueError: see `read`.
    """
    expected = read(folder)
    every = names(folder, exempt)
    found = _files(folder)
    mine = range(part, len(every), parts)
    there = [i for i in mine if every[i] in found]
    good = {
        i
        for i, value in zip(there, _hashes(folder, [every[i] for i in there]))
        if expected.get(every[i]) == value
    }
    return next((i for i in mine if i not in good), None)


def names(folder: Path, exempt: Collection[str] = ()) -> list[str]:
    """Files that are in `folder` or should be, sorted: one that is in no list is damage too.

    Raises:
      ValueError: see `read`.
    """
    return sorted((_files(folder) | read(folder).keys()) - set(exempt))


def file_is_good(folder: Path, name: str) -> bool:
    """Whether one file is as it was written.

    Raises:
      ValueError: see `read`.
    """
    return read(folder).get(name) == next(_hashes(folder, [name]))


def digest(folder: Path) -> str:
    """One SHA-256 for the content of all files, from `SHA256SUMS` alone.

    Raises:
      ValueError: see `read`.
    """
    return hashlib.sha256(repr(sorted(read(folder).items())).encode()).hexdigest()


def _files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path != folder / NAME
    }


def _hashes(folder: Path, names: list[str]):
    def one(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(one, names)
