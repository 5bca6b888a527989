"""Writing so that nothing is left half-written or written by two, on disk or in an object store."""

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
from ppflow_jax.files import lease
from ppflow_jax.files.place import ObjectPath, is_object, place
from ppflow_jax.files.scratch import scratch


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` when the block succeeds.

    In an object store it is a file on this machine, which is uploaded then.
    """
    if isinstance(path, ObjectPath):
        temporary = scratch(path.name)
        try:
            yield temporary
            lease.check(path)
            path.upload(temporary)
        finally:
            temporary.unlink(missing_ok=True)
        return
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
    path = place(path).absolute()
    if isinstance(path, ObjectPath):
        return _writable_store(path)
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


def _writable_store(path: ObjectPath) -> ObjectPath:
    """The same of a folder in a bucket: written, read and removed."""
    probe = path / f".write-test.{socket.gethostname()}.{os.getpid()}"
    try:
        probe.write_bytes(b"probe")
        probe.read_bytes()
        probe.unlink(missing_ok=True)
    except OSError as e:
        raise InputError(
            f"cannot write to {path} ({e.strerror}): choose a bucket where you may write"
        ) from e
    return path


def check_room(path: str | Path, size: int, what: str) -> None:
    """
    Raises:
      InputError: fewer than `size` bytes are free where `path` is or would be made. An object store
        says so when it is full.
    """
    if is_object(path):
        return
    path = Path(path).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise InputError(
            f"{what} need at least {size / 1e9:,.1f} GB in {path}, and {free / 1e9:,.1f} GB are "
            "free: ask for less, or give another folder"
        )


def remove_tree(folder: Path) -> None:
    """Remove a folder with all that is in it, as far as that is possible."""
    if isinstance(folder, ObjectPath):
        folder.rmtree()
    else:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that ask the same out of `folder` until the block ends.

    An advisory lock on `folder/.lock`, which the system lets go when the process dies, however it
    dies. It holds between machines where the file system passes locks on (NFS 4, Lustre with
    `flock`); one without locks is said and used all the same. In an object store it is a lease.

    Raises:
      InputError: another process holds it.
    """
    if isinstance(folder, ObjectPath):
        with lease.leased(folder):
            yield
        return
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
