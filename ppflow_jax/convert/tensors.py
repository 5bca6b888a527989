"""Tensors of a PyTorch file, checked against it but not yet read."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from math import prod

import ml_dtypes
import numpy as np

from ppflow_jax.errors import InputError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# The typed storages of torch that have a NumPy dtype; the writer uses the same table.
STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# Typed storages that are read but never written: complex numbers, and the whole numbers of
# quantized tensors, whose scales are elsewhere.
UNUSUAL_STORAGES = {
    "ComplexFloatStorage": np.dtype("<c8"),
    "ComplexDoubleStorage": np.dtype("<c16"),
    "QInt8Storage": np.dtype("i1"),
    "QUInt8Storage": np.dtype("u1"),
    "QUInt4x2Storage": np.dtype("u1"),
    "QUInt2x4Storage": np.dtype("u1"),
    "QInt32Storage": np.dtype("<i4"),
}
# The 8-bit floating-point numbers by torch's names, which are also those of ml_dtypes.
FLOAT8 = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
}
_MOST_DIMENSIONS = 32
# An expanded (0-stride) tensor is larger than what the file stores; this much is let through.
_LARGEST_EXPANDED = 64 * 2**20


def shown(text: object) -> str:
    """A string of the file for an error message: one printable line, not too long."""
    text = str(text)
    text = text if text.isprintable() and text.isascii() else ascii(text)[1:-1]
    return text if len(text) <= 100 else text[:97] + "..."


@dataclass(eq=False)
class Storage:
    """A run of bytes in the file that tensors are views of.

    `start` is None until the reader of the container has found and checked the bytes.
    """

    path: str
    file_size: int
    key: str
    dtype: np.dtype
    numel: int
    start: int | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def place(self, start: int, available: int) -> None:
        """Says where the bytes are. InputError if fewer are there than the storage claims."""
        found = max(0, min(available, self.file_size - start))
        if found < self.nbytes:
            raise InputError(
                f"storage {shown(self.key)} is shorter than its tensors: expected {self.nbytes} "
                f"bytes, found {found}; the file is cut short or broken, download it again"
            )
        self.start = start


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A strided view of a storage; offset and strides count elements. `read()` gives the array."""

    storage: Storage
    dtype: np.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def name(self) -> str:
        """Key of the storage in the file."""
        return self.storage.key

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array that `read()` returns."""
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Copies this one tensor out of the memory-mapped file, C-contiguous.

        Raises InputError if the file is gone, is not the size it had when it was opened, or the
        array does not fit in memory.
        """
        storage = self.storage
        try:
            out = np.empty(self.shape, self.dtype)
            if out.size == 0:
                return out
            with open(storage.path, "rb") as file:
                # Touching a mapped page beyond the end of a file would kill the process.
                if os.fstat(file.fileno()).st_size != storage.file_size:
                    raise InputError(f"{storage.path}: changed while it was read; convert it again")
                self._copy_into(out, file.fileno())
        except OSError as error:
            raise InputError(f"{storage.path}: cannot be read: {error.strerror}") from error
        except MemoryError as error:
            raise InputError(
                f"{storage.path}: no memory for a tensor of {self.nbytes} bytes, shape {self.shape}"
            ) from error
        return out

    def _copy_into(self, out: np.ndarray, descriptor: int) -> None:
        itemsize = self.dtype.itemsize
        first = self.storage.start + self.offset * itemsize
        page = first - first % mmap.ALLOCATIONGRANULARITY
        extent = _extent(self.shape, self.stride) * itemsize
        with mmap.mmap(
            descriptor, first - page + extent, access=mmap.ACCESS_READ, offset=page
        ) as mapped:
            raw = np.frombuffer(mapped, np.uint8, extent, offset=first - page)
            # A bool byte other than 0 and 1 is undefined in NumPy: any that is not 0 is true.
            flat = raw != 0 if self.dtype == np.bool_ else raw
            strides = tuple(step * itemsize for step in self.stride)
            view = np.ndarray(self.shape, self.dtype, flat, strides=strides)
            np.copyto(out, view)
            del raw, flat, view  # a map with views on it cannot be closed


def _extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last one that a non-empty view touches, inclusive."""
    return 1 + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))


def tensor_ref(
    storage: object, offset: object, shape: object, stride: object, dtype: np.dtype | None = None
) -> TensorRef:
    """A view that is known to lie inside its storage. InputError says what does not fit."""
    if not isinstance(storage, Storage):
        raise InputError("a tensor has no storage; the pickle inside is broken or hostile")
    for label, numbers in (("shape", shape), ("stride", stride), ("offset", (offset,))):
        if type(numbers) is not tuple or any(type(n) is not int for n in numbers):
            raise InputError(f"a tensor's {label} is not made of whole numbers; the file is broken")
        if any(n < 0 for n in numbers):
            raise InputError(f"a tensor has a negative {label} {numbers}; expected 0 or more")
    if len(shape) != len(stride) or len(shape) > _MOST_DIMENSIONS:
        raise InputError(
            f"a tensor has {len(shape)} dimensions and {len(stride)} strides; "
            f"expected as many of both, at most {_MOST_DIMENSIONS}"
        )
    dtype = storage.dtype if dtype is None else dtype
    ref = TensorRef(storage, dtype, shape, stride, offset)
    limit = max(_LARGEST_EXPANDED, storage.nbytes)
    # An empty tensor too must have dimensions that NumPy can hold.
    if prod(n for n in shape if n) * dtype.itemsize > limit:
        raise InputError(
            f"a tensor of absurd shape {shape} in a storage of {storage.nbytes} bytes; "
            "the file is broken or hostile"
        )
    needed = (offset + _extent(shape, stride) if ref.size else offset) * dtype.itemsize
    if needed > storage.nbytes:
        raise InputError(
            f"a tensor of shape {shape}, stride {stride}, offset {offset} needs {needed} bytes, "
            f"but storage {shown(storage.key)} has {storage.nbytes}; the file is broken"
        )
    return ref


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a C-contiguous array in elements; NumPy gives others where a length is 1 or 0."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))
