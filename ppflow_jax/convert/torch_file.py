"""PyTorch files (`.pt`, `.pth`, `.bin`) without torch and without running anything from them.

Two formats: a zip archive of one pickle and one member per storage (PyTorch 1.6 and later, and
TorchScript), and the legacy one, five pickles followed by the storages. Only the pickles are
read here; tensors stay in the file as `TensorRef`s.
"""

from __future__ import annotations

import os
import stat
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from ppflow_jax.convert.placeholder import Placeholder, unreadable
from ppflow_jax.convert.tensors import Storage, shown
from ppflow_jax.convert.torch_globals import StorageType
from ppflow_jax.convert.torch_pickle import PickleReader
from ppflow_jax.errors import InputError

_LONGEST_PICKLE = 128 * 2**20  # that of a 675M-parameter checkpoint has 0.3 MB; arrays add to it
_LONGEST_LEGACY_HEAD = 8 * 2**20  # the five pickles, read at once
_MOST_MEMBERS = 1_000_000
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")


def open_torch_file(path: str | os.PathLike[str]) -> Any:
    """The object in a PyTorch file, with a `TensorRef` for each tensor.

    Containers come back as dict, list and tuple, an argparse.Namespace as a dict of its
    attributes, and what is neither plain data nor a dense tensor as a `Placeholder`. A TorchScript
    archive gives nested dicts of the modules' attributes, and its constants, if any, as
    `CONSTANTS: {c0: ..., c1: ...}`; its code is not looked at.

    Raises InputError, one line with the file's name, if the file cannot be read, is broken, is in
    another format.
    """
    with one_line_errors(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(512)
        if head[:4] == b"PK\x03\x04":
            return _read_zip(os.fspath(path), file, size)
        if head[:1] == b"\x80":
            return _read_legacy(os.fspath(path), file, size)
        raise InputError(_what_else(head))


@contextmanager
def one_line_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what a broken file makes Python raise into one line that names the file."""
    name = os.fspath(path)
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}") from error
    except zipfile.BadZipFile as error:
        raise InputError(
            f"{name}: the zip archive is cut short or broken ({shown(error)}); download it again"
        ) from error
    except MemoryError as error:
        raise InputError(f"{name}: reading it needs more memory than there is") from error
    # What zipfile and struct raise for bytes that make no sense; Unicode errors are ValueErrors.
    except (
        ValueError,
        IndexError,
        KeyError,
        OverflowError,
        EOFError,
        RecursionError,
        NotImplementedError,
        struct.error,
    ) as error:
        raise InputError(
            f"{name}: broken ({type(error).__name__}: {shown(error)}); download it again"
        ) from error


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file for reading. InputError for folders, pipes and devices; OSError as `open`."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise InputError("is a folder or a device; expected a file of weights")
    return open(path, "rb")


def _what_else(head: bytes) -> str:
    expected = "expected a PyTorch file (.pt, .pth, .bin)"
    if not head:
        return f"is empty; {expected}: download or save it again"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27:
        return f"is a safetensors file; {expected}: give it a name that ends in .safetensors"
    if head[257:262] == b"ustar":
        return "is a tar archive, as PyTorch 0.1 wrote; load it there and save it again"
    if all(byte in b"\t\n\r" or 32 <= byte for byte in head):
        return f"is text, perhaps an error page or a Git LFS pointer; {expected}: download it again"
    return f"is not a PyTorch file: it begins with {head[:8].hex(' ')}; {expected}"


class _Archive:
    """The members of a zip file by name, all of which lie uncompressed in the file."""

    def __init__(self, path: str, file: BinaryIO, size: int):
        self.path, self.file, self.size = path, file, size
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
        if len(infos) > _MOST_MEMBERS:
            raise InputError(f"an archive of {len(infos)} members; no checkpoint has so many")
        self.members: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            name = info.filename
            if (
                name != info.orig_filename
                or "\\" in name
                or {"", ".", ".."} & set(name.removesuffix("/").split("/"))
            ):
                raise InputError(f"refused: a member of the archive is called {shown(name)}")
            if name in self.members:
                raise InputError(f"refused: the archive has two members {shown(name)}")
            self.members[name] = info
        pickles = [n for n in self.members if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise InputError(
                f"an archive with {len(pickles)} members */data.pkl; expected one: not a file "
                "that torch.save or torch.jit.save wrote"
            )
        self.root = pickles[0].removesuffix("data.pkl")

    def locate(self, name: str) -> tuple[int, int]:
        """Where the bytes of a member begin and how many they are."""
        info = self.members.get(self.root + name)
        if info is None:
            raise InputError(f"{shown(name)} is missing in the archive; save or download it again")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise InputError(
                f"refused: {shown(name)} is compressed to {info.compress_size} of "
                f"{info.file_size} bytes; expected stored members, as torch.save writes them: "
                "unpack and pack it again with zip -0"
            )
        if info.flag_bits & 1:
            raise InputError(f"{shown(name)} is encrypted; expected a plain archive")
        self.file.seek(info.header_offset)
        header = self.file.read(_LOCAL_HEADER.size)
        magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        if magic != b"PK\x03\x04":
            raise InputError(f"the archive is broken at {shown(name)}; download it again")
        return info.header_offset + len(header) + name_length + extra_length, info.file_size

    def read(self, name: str, longest: int) -> bytes:
        """The bytes of a small member. CRCs are not checked: torch can be told to write none."""
        start, length = self.locate(name)
        if length > longest:
            raise InputError(f"{name} has {length} bytes; expected at most {longest}")
        self.file.seek(start)
        found = self.file.read(length)
        if len(found) < length:
            raise InputError(f"{name} is cut short; download the file again")
        return found


class _Storages:
    """The storages that a pickle mentions, each made once."""

    def __init__(self, path: str, size: int, archive: _Archive | None, folder: str = "data"):
        self.path, self.size, self.archive, self.folder = path, size, archive, folder
        self.by_key: dict[str, Storage] = {}

    def __call__(self, persistent_id: object) -> Storage | Placeholder:
        """The storage of ('storage', type, key, location, numel[, view]); InputError otherwise.

        Tensors on what has no bytes or an unknown type of them cannot be read: a placeholder.
        """
        match persistent_id if type(persistent_id) is tuple else None:
            case ("module", Placeholder() as kind, *_):
                return kind  # of a whole module, which the legacy format saves with its source code
            case ("storage", Placeholder(what=what), str(), *_):
                return unreadable(f"a tensor whose storage is {what}")
            case ("storage", StorageType(), str(), "meta", int(), *_):
                return unreadable("a tensor without data (of the meta device)")
            case ("storage", StorageType(dtype=dtype), str(key), str() | None, int(numel), *view):
                if view not in ([], [None]):
                    self._storage(key, dtype, numel)
                    return unreadable("a tensor on a view of a storage")
            case _:
                raise InputError(
                    "a storage is not named as torch.save does: expected ('storage', type, key, "
                    "location, number of elements); the file is broken or hostile"
                )
        return self._storage(key, dtype, numel)

    def _storage(self, key: str, dtype: np.dtype, numel: int) -> Storage:
        if not 0 <= numel * dtype.itemsize <= self.size:
            raise InputError(
                f"storage {shown(key)} claims {numel} elements in a file of {self.size} bytes; "
                "the file is cut short or broken, download it again"
            )
        storage = self.by_key.get(key)
        if storage is None:
            storage = Storage(self.path, self.size, key, dtype, numel)
            if self.archive is not None and numel:
                storage.place(*self.archive.locate(f"{self.folder}/{key}"))
            self.by_key[key] = storage
        elif (storage.dtype, storage.numel) != (dtype, numel):
            raise InputError(f"storage {shown(key)} is named with two types or sizes")
        return storage


def _read_zip(path: str, file: BinaryIO, size: int) -> Any:
    archive = _Archive(path, file, size)
    if f"{archive.root}byteorder" in archive.members:
        order = archive.read("byteorder", 16)
        if order != b"little":
            raise InputError(
                f"byte order {shown(order.decode('latin-1'))}; expected little: load it with torch "
                "on a little-endian machine and save it again"
            )
    script = any(name.startswith(f"{archive.root}code/") for name in archive.members)

    def unpickle(name: str, folder: str) -> Any:
        data = archive.read(name, _LONGEST_PICKLE)
        return PickleReader(data, _Storages(path, size, archive, folder), script).load()

    tree = unpickle("data.pkl", "data")
    if script and isinstance(tree, dict) and f"{archive.root}constants.pkl" in archive.members:
        constants = unpickle("constants.pkl", "constants")
        if isinstance(constants, tuple) and constants:
            tree["CONSTANTS"] = {f"c{i}": value for i, value in enumerate(constants)}
    return tree


def _read_legacy(path: str, file: BinaryIO, size: int) -> Any:
    file.seek(0)
    storages = _Storages(path, size, None)
    reader = PickleReader(file.read(_LONGEST_LEGACY_HEAD), storages)
    # Any other pickle would be read, not run, but the message should name the real problem.
    if reader.load() != _LEGACY_MAGIC:
        raise InputError("is a pickle, but not one of torch.save; expected a PyTorch file")
    protocol, system = reader.load(), reader.load()
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise InputError(f"legacy format of unknown version {shown(protocol)}; save it again")
    if system.get("little_endian") is not True:
        raise InputError("big-endian numbers; expected little: load it with torch and save again")
    tree, keys = reader.load(), reader.load()
    if not isinstance(keys, list) or set(map(type, keys)) - {str}:
        raise InputError("the list of storages is broken; download the file again")
    position = reader.position
    for key in keys:
        storage = storages.by_key.get(key)
        if storage is None or storage.start is not None:
            raise InputError(f"storage {shown(key)} belongs to no tensor or comes twice")
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            raise InputError(f"cut short before storage {shown(key)}; download the file again")
        numel = int.from_bytes(header, "little", signed=True)
        if numel != storage.numel:
            raise InputError(
                f"storage {shown(key)} has {numel} elements where its tensors say {storage.numel}; "
                "the file is broken, download it again"
            )
        storage.place(position + 8, size - position - 8)
        position += 8 + storage.nbytes
    missing = [shown(key) for key, s in storages.by_key.items() if s.start is None and s.numel]
    if missing:
        raise InputError(f"{len(missing)} storages are missing, the first is {missing[0]}")
    return tree
