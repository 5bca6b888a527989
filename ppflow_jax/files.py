"""Writing to disk so that nothing is left half-written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ppflow_jax.errors import InputError


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def writable_directory(path: str | Path) -> Path:
    """Make the directory if needed and prove that files can be written there.

    Raises:
      InputError: it cannot be made or written.
    """
    path = Path(path).absolute()
    probe = path / f".write-test.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another host may have the same process number
    except OSError as e:
        raise InputError(
            f"cannot write to {path} ({e.strerror}): choose a folder where you may write"
        ) from e
    return path
