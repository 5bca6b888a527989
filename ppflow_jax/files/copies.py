"""Folders between this machine and an object store, and local copies of what lies in one."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ppflow_jax.errors import InputError
from ppflow_jax.files import checksums
from ppflow_jax.files.objects import Damaged
from ppflow_jax.files.place import ObjectPath, place
from ppflow_jax.files.scratch import scratch

AT_ONCE = 8  # objects


def upload_folder(local: Path, target: ObjectPath, last: str) -> None:
    """All files of `local`, those that begin with a dot left out; the file `last` when all others
    are there.

    Raises:
      OSError: see `objects.ask`.
    """
    names = {
        str(path.relative_to(local))
        for path in local.rglob("*")
        if path.is_file() and path.name[0] != "."
    }
    _each(lambda name: (target / name).upload(local / name), names - {last})
    (target / last).upload(local / last)


def download_folder(source: ObjectPath, local: Path, sums: dict[str, str]) -> list[str]:
    """The files of `sums` (SHA-256 by relative path), and which of them are not as it says.

    Raises:
      OSError: see `objects.ask`.
    """
    bad: list[str] = []

    def one(name: str) -> None:
        try:
            (source / name).download(local / name, sums[name])
        except (FileNotFoundError, Damaged):
            bad.append(name)

    _each(one, sums)
    return sorted(bad)


def _each(function: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(function, sorted(names)):
            pass


def given(text: str) -> Path:
    """The file that a user names, on this machine.

    Raises:
      InputError: it cannot be read.
    """
    try:
        return local_file(place(text))
    except OSError as e:
        raise InputError(f"cannot read {text} ({e.strerror})") from e


@contextlib.contextmanager
def borrowed(path: Path) -> Iterator[Path]:
    """`path` itself, or a copy of an object on this machine while the block lasts.

    Raises:
      OSError: see `objects.ask`.
    """
    if not isinstance(path, ObjectPath):
        yield path
        return
    copy = scratch(path.name)
    path.download(copy)
    try:
        yield copy
    finally:
        copy.unlink(missing_ok=True)


@functools.cache
def local_file(path: Path) -> Path:
    """`path` itself, or a copy of an object on this machine, made once.

    Raises:
      OSError: see `objects.ask`.
    """
    if not isinstance(path, ObjectPath):
        return path
    copy = scratch(path.name)
    path.download(copy)
    return copy


_copies: dict[str, Path] = {}  # folders with checksums, by address


def copied(path: ObjectPath) -> Path:
    """A copy of a folder with `SHA256SUMS` on this machine, every file compared with its sum.

    Raises:
      ValueError: a file is damaged or missing.
      OSError: see `objects.ask`.
    """
    if str(path) not in _copies:
        folder, sums = scratch(path.name), checksums.read(path)
        if odd := [name for name in sums if name[:1] in ("", "/") or ".." in name.split("/")]:
            raise ValueError(f"{checksums.NAME} names {odd[0]!r}, which is not in the folder")
        if bad := download_folder(path, folder, sums):
            shutil.rmtree(folder, ignore_errors=True)
            raise ValueError(f"{bad[0]} is not as it was written: see {checksums.NAME}")
        (path / checksums.NAME).download(folder / checksums.NAME)
        _copies[str(path)] = folder
    return _copies[str(path)]


@contextlib.contextmanager
def here(path: Path) -> Iterator[Path]:
    """The folder `path`, on this machine while the block lasts.

    Raises:
      ValueError: a file is damaged or missing.
      OSError: see `objects.ask`.
    """
    if not isinstance(path, ObjectPath):
        yield path
        return
    folder = copied(path)
    try:
        yield folder
    finally:
        _copies.pop(str(path), None)
        shutil.rmtree(folder, ignore_errors=True)
