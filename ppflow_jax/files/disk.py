"""Writing to disk so that nothing is left half-written or written by two."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import sys
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


def check_room(path: str | Path, size: int, what: str) -> None:
    """
    Raises:
      InputError: fewer than `size` bytes are free where `path` is or would be made.
    """
    path = Path(path).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise InputError(
            f"{what} need at least {size / 1e9:,.1f} GB in {path}, and {free / 1e9:,.1f} GB are "
            "free: ask for less, or give another folder"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that ask the same out of `folder` until the block ends.

    An advisory lock on `folder/.lock`, which the system lets go when the process dies, however it
    dies. It holds between machines where the file system passes locks on (NFS 4, Lustre with
    `flock`); one without locks is said and used all the same.

    Raises:
      InputError: another process holds it.
    """
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            file.seek(0)
            raise InputError(
                f"{folder} is in use by {file.read().strip() or 'another run'}: wait for it, stop "
                "it, or give another folder"
            ) from e
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print(
                f"no locks on this file system ({e.strerror}): see that one run uses {folder}",
                file=sys.stderr,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
