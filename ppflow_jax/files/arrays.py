""".npy files on disk or in an object store."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from ppflow_jax.files.place import ObjectPath

_HEADER = 1024  # bytes that have the header of an array


def load_array(path: Path) -> np.ndarray:
    """The array of a .npy file.

    Raises:
      OSError, ValueError, EOFError: not there, or not a whole .npy file.
    """
    if isinstance(path, ObjectPath):
        return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    return np.load(path, allow_pickle=False)


def rows_of(path: Path) -> int:
    """Length of the array of a .npy file, whose size is compared with its header; reads no value.

    Raises:
      OSError, ValueError, EOFError: not there, or not a whole .npy file.
    """
    if not isinstance(path, ObjectPath):
        return len(np.load(path, mmap_mode="r"))
    size = path.stat().st_size
    file = io.BytesIO(path.read_range(0, min(size, _HEADER)))
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{path} is not a .npy file of version 1")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if size != file.tell() + int(np.prod(shape)) * dtype.itemsize:
        raise ValueError(f"{path} has {size} bytes, which is not what its header says")
    return shape[0]
