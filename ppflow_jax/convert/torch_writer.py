"""Writes a `.pt` file that `torch.load(weights_only=True)` reads, without torch.

The layout is that of `torch.save` since 1.6: a zip archive of uncompressed members, the tensors'
bytes aligned to 64, and a pickle that names them.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ppflow_jax.convert.tensors import STORAGES, contiguous, shown
from ppflow_jax.errors import InputError

_ALIGNMENT = 64
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
_LOCAL_HEADER_BYTES = 30
_ZIP64_EXTRA_BYTES = 20
_ROOT = "archive"


def save_torch_file(path: str | os.PathLike[str], tree: Mapping[Any, Any]) -> None:
    """Writes nested dicts, lists and tuples of arrays, texts, numbers, booleans and None.

    An array may be NumPy's or JAX's, something with a method `read()` (a `TensorRef`), or a
    function of no arguments that returns an array: it is made when its turn comes and let go
    when it is written, so that only one is in memory. Nothing is shared between two leaves.

    The file appears under its name only when it is complete. Raises InputError for a leaf that a
    PyTorch file cannot hold or if the file cannot be written.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                _Writer(file, archive).write(tree)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


class _Writer:
    def __init__(self, file: BinaryIO, archive: zipfile.ZipFile):
        self.file, self.archive, self.count = file, archive, 0

    def write(self, tree: Mapping[Any, Any]) -> None:
        # torch.save puts the pickle first, but readers find members by name, and the shapes that
        # the pickle states are known only when the last array has been made.
        self._member("version", b"3\n")
        self._member("byteorder", b"little")
        program = pickle.PROTO + b"\x02" + self._encode(tree, "") + pickle.STOP
        self._member("data.pkl", program)

    def _member(self, name: str, data: bytes | memoryview) -> None:
        info = zipfile.ZipInfo(f"{_ROOT}/{name}")  # dated 1980: the same tree, the same file
        info.file_size = len(data)
        large = info.file_size >= 2**31
        begin = self.file.tell() + _LOCAL_HEADER_BYTES + len(info.filename)
        begin += _ZIP64_EXTRA_BYTES if large else 0
        padding = -(begin + 4) % _ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
        with self.archive.open(info, "w", force_zip64=large) as member:
            member.write(data)

    def _encode(self, node: Any, where: str) -> bytes:
        """The pickle opcodes of a node; its tensors are written on the way."""
        if node is None:
            return pickle.NONE
        if isinstance(node, bool):
            return pickle.NEWTRUE if node else pickle.NEWFALSE
        if isinstance(node, str):
            text = node.encode()
            return pickle.BINUNICODE + struct.pack("<I", len(text)) + text
        if isinstance(node, int):
            if -(2**31) <= node < 2**31:
                return pickle.BININT + struct.pack("<i", node)
            number = pickle.encode_long(node)
            if len(number) > 8:
                raise InputError(f"{where} is a whole number of more than 64 bits")
            return pickle.LONG1 + bytes([len(number)]) + number
        if isinstance(node, float) and not isinstance(node, np.generic):
            return pickle.BINFLOAT + struct.pack(">d", node)
        if isinstance(node, Mapping):
            items = []
            for key, value in node.items():
                if not isinstance(key, str | int):
                    raise InputError(f"{where or 'the tree'} has a key {shown(key)}; expected text")
                here = f"{where}.{key}" if where else str(key)
                items.append(self._encode(key, here) + self._encode(value, here))
            return pickle.EMPTY_DICT + pickle.MARK + b"".join(items) + pickle.SETITEMS
        if isinstance(node, list | tuple):
            parts = b"".join(self._encode(v, f"{where}[{i}]") for i, v in enumerate(node))
            if isinstance(node, list):
                return pickle.EMPTY_LIST + pickle.MARK + parts + pickle.APPENDS
            return pickle.MARK + parts + pickle.TUPLE
        return self._tensor(node, where)

    def _tensor(self, node: Any, where: str) -> bytes:
        read = getattr(node, "read", node)
        if not callable(read) and not hasattr(node, "__array__"):
            raise InputError(
                f"{where} is a {type(node).__name__}; expected an array, text, number or container"
            )
        array = np.asarray(read() if callable(read) else node, order="C")
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        if array.dtype not in _STORAGE_NAMES:
            raise InputError(
                f"{where} has dtype {array.dtype}; expected one of "
                f"{', '.join(map(str, _STORAGE_NAMES))}"
            )
        key = str(self.count)
        self.count += 1
        self._member(f"data/{key}", memoryview(array.reshape(-1).view(np.uint8)))
        strides = contiguous(array.shape)
        persistent_id = (
            pickle.MARK
            + self._encode("storage", where)
            + _global("torch", _STORAGE_NAMES[array.dtype])
            + b"".join(self._encode(part, where) for part in (key, "cpu", array.size))
            + pickle.TUPLE
            + pickle.BINPERSID
        )
        return (
            _global("torch._utils", "_rebuild_tensor_v2")
            + pickle.MARK
            + persistent_id
            + b"".join(self._encode(part, where) for part in (0, array.shape, strides, False))
            + _global("collections", "OrderedDict")
            + pickle.EMPTY_TUPLE
            + pickle.REDUCE
            + pickle.TUPLE
            + pickle.REDUCE
        )


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
