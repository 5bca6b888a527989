"""Where files are: a local path, or an address in an object store.

    place("runs/b2")          a pathlib.Path, as ever
    place("gs://bucket/b2")   an ObjectPath: a Path whose names lie in a bucket

An `ObjectPath` has those methods of `Path` that an object store can keep: read, write whole, list,
remove, measure. What it cannot keep, such as renaming, raises. The promises of `files/` hold on
both sides, by other means:

* Nothing half-written (`disk.atomic`). Local: a temporary name and a rename. Store: a file on this
  machine, then one upload; an object is there whole or not at all.
* A folder counts when it is whole. Local: it is renamed. Store: its last object counts,
  `SHA256SUMS` or a manifest, which is uploaded when all others are there.
* One writer (`disk.locked`). Local: `flock`. Store: a lease, an object that only one process can
  create, with a heartbeat (lease.py).
* Damage is never used. Both: `SHA256SUMS` and sizes. Store: besides, every object that is read is
  compared with the digest that the store has of it.
* A full disk or quota is one line. Both: an `OSError`; of a store after retries (objects.py).

Large arrays are read from a copy on this machine (copies.py), which is compared with `SHA256SUMS`
while it is made: memory maps and Orbax then work as they do on any disk.
"""

from __future__ import annotations

import base64
import errno
import fnmatch
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PosixPath
from typing import Any

from ppflow_jax.files.objects import Damaged, ask, scheme_of
from ppflow_jax.files.scratch import scratch

SCHEMES = ("gs://", "s3://")
_NO_BUCKET = "the bucket does not exist"  # all that can be missing where something is written
_READS = 3  # of an object that is not what the store says: it may have been replaced meanwhile


def place(path: str | Path) -> Path:
    """`path` as it is, or an `ObjectPath` if it is an address in an object store."""
    text = os.fspath(path)
    if isinstance(path, ObjectPath) or not text.startswith(SCHEMES):
        return path if isinstance(path, Path) else Path(path)
    return ObjectPath(text)


def lexical(path: str) -> Path:
    """`path` made absolute without following links, or an `ObjectPath`."""
    return place(path if is_object(path) else os.path.abspath(path))


def is_object(path: str | Path) -> bool:
    """Whether it is an address in an object store."""
    return os.fspath(path).startswith(SCHEMES)


class ObjectPath(PosixPath):
    """An address `gs://BUCKET/KEY` or `s3://BUCKET/KEY`, see the top of this file.

    As a path it has the parts `gs:`, BUCKET and those of KEY, so that names, parents and `/` are
    those of `pathlib`. A folder is there when an object below it is.
    """

    __slots__ = ()

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def __fspath__(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"ObjectPath({str(self)!r})"

    def __reduce__(self):
        return ObjectPath, (str(self),)

    def is_absolute(self) -> bool:
        return True

    def absolute(self) -> ObjectPath:
        return self

    def resolve(self, strict: bool = False) -> ObjectPath:
        return self

    def info(self) -> dict[str, Any] | None:
        """What the store says of it: `type` is `file` or `directory`; None if it is not there.

        Raises:
          OSError: see `objects.ask`.
        """
        try:
            return ask(str(self), lambda system: system.info(str(self)))
        except FileNotFoundError:
            return None

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self.info() is not None

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        return (self.info() or {}).get("type") == "file"

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return (self.info() or {}).get("type") == "directory"

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Kind, size and time of last change; the rest is 0."""
        found = self.info()
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "not found", str(self))
        kind = stat.S_IFDIR if found["type"] == "directory" else stat.S_IFREG
        changed = found.get("mtime") or found.get("LastModified")
        at = int(changed.timestamp()) if hasattr(changed, "timestamp") else 0
        return os.stat_result((kind, 0, 0, 0, 0, 0, int(found["size"] or 0), at, at, at))

    def iterdir(self) -> Iterator[ObjectPath]:
        yield from (child for child, _ in self.children())

    def children(self) -> list[tuple[ObjectPath, bool]]:
        """What is in the folder, by one request, and whether each is a folder itself.

        Nothing where nothing is: a folder that is to be written need not be made.
        """
        try:
            found = ask(str(self), lambda system: system.ls(str(self), detail=True, refresh=True))
        except FileNotFoundError:
            return []
        names = {e["name"].rstrip("/").rpartition("/")[2]: e["type"] for e in found}
        names.pop("", None)
        if names == {self.name: "file"}:  # the listing of a file is that file
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(self))
        return [(self / name, kind == "directory") for name, kind in sorted(names.items())]

    def glob(self, pattern: str, **_: Any) -> Iterator[ObjectPath]:
        if "/" in pattern or "**" in pattern:
            raise NotImplementedError(f"glob {pattern!r} in an object store")
        yield from (path for path, _ in self.children() if fnmatch.fnmatchcase(path.name, pattern))

    def rglob(self, pattern: str, **_: Any) -> Iterator[ObjectPath]:
        """Files only: there are no folders without them."""
        found = ask(str(self), lambda system: system.find(str(self)))
        start = len(str(self).partition("://")[2].rstrip("/")) + 1
        paths = (self / name[start:] for name in sorted(found) if len(name) > start)
        yield from (path for path in paths if fnmatch.fnmatchcase(path.name, pattern))

    def read_bytes(self) -> bytes:
        """All of it, compared with the digest that the store has.

        Raises:
          Damaged: it is not what was written.
          OSError: see `objects.ask`.
        """
        url = str(self)
        for _ in range(_READS):
            data = ask(url, lambda system: system.cat_file(url))
            if _is_whole(url, len(data), hashlib.md5(data), hashlib.sha256(data)):
                return data
        raise Damaged(errno.EIO, "what was read is not what was written", url)

    def read_text(self, *args: Any, **kwargs: Any) -> str:
        return self.read_bytes().decode()

    def read_range(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of it; whoever asks compares them."""
        url = str(self)
        data = ask(url, lambda system: system.cat_file(url, start=start, end=stop))
        if len(data) != stop - start:
            raise OSError(errno.EIO, f"{len(data)} bytes of {stop - start} were read", url)
        return data

    def open(self, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """To read only: `disk.atomic` writes."""
        if mode in ("r", "rt"):
            return io.StringIO(self.read_text())
        if mode != "rb":
            raise OSError(errno.EROFS, f"an object is not opened with mode {mode!r}", str(self))
        copy = scratch(self.name)
        self.download(copy)
        file = copy.open("rb")
        copy.unlink()  # read through the open file
        return file

    def write_bytes(self, data: bytes, *, create: bool = False) -> int:
        """All of it at once.

        Raises:
          FileExistsError: with `create`, where it is there already: of several, one creates it.
        """
        url = str(self)
        more = {"Metadata": {"sha256": hashlib.sha256(data).hexdigest()}}
        more = {} if scheme_of(url) == "gs" else more
        mode = "create" if create else "overwrite"
        ask(url, lambda system: system.pipe_file(url, data, mode=mode, **more), _NO_BUCKET)
        return len(data)

    def write_text(self, data: str, *args: Any, **kwargs: Any) -> int:
        return self.write_bytes(data.encode())

    def upload(self, file: Path) -> None:
        """Make it what `file` on this machine is."""
        url, more = str(self), {}
        if scheme_of(url) != "gs":
            with file.open("rb") as opened:
                more = {"Metadata": {"sha256": hashlib.file_digest(opened, "sha256").hexdigest()}}
        ask(url, lambda system: system.put_file(str(file), url, **more), _NO_BUCKET)

    def download(self, file: Path, sha256: str | None = None) -> None:
        """A copy of it at `file`, compared with `sha256`, or with the digest that the store has.

        Raises:
          Damaged: it is not what was written.
          OSError: see `objects.ask`.
        """
        url = str(self)
        file.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_READS):
            ask(url, lambda system: system.get_file(url, str(file)))
            with file.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256")
            if sha256 is not None:
                if found.hexdigest() == sha256:
                    return
                continue
            with file.open("rb") as opened:
                md5 = hashlib.file_digest(opened, "md5")
            if _is_whole(url, file.stat().st_size, md5, found):
                return
        file.unlink()
        raise Damaged(errno.EIO, "what was read is not what was written", url)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            ask(str(self), lambda system: system.rm_file(str(self)))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self) -> None:
        """Remove everything below it."""
        for path in list(self.rglob("*")):
            path.unlink(missing_ok=True)

    def mkdir(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: a folder is there when something is in it."""

    def touch(self, *args: Any, **kwargs: Any) -> None:
        self.write_bytes(b"")

    def rename(self, target: Any) -> Any:
        raise OSError(errno.EOPNOTSUPP, "an object store does not rename", str(self))

    replace = symlink_to = hardlink_to = chmod = rmdir = rename


def _is_whole(url: str, size: int, md5: Any, sha256: Any) -> bool:
    """Whether what was read is what the store says of it: MD5 of `gs`, our SHA-256 of `s3`."""
    found = ask(url, lambda system: system.info(url))
    if int(found["size"]) != size:
        return False
    if scheme_of(url) == "gs":
        kept = found.get("md5Hash")  # objects composed of others have none
        return kept is None or base64.b64decode(kept) == md5.digest()
    kept = ask(url, lambda system: system.metadata(url)).get("sha256")
    return kept is None or kept == sha256.hexdigest()
