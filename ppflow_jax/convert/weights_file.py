"""Any file of weights as one flat mapping of names to tensors that are read one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from ppflow_jax.convert.tensors import TensorRef, shown
from ppflow_jax.convert.torch_file import one_line_errors, open_regular, open_torch_file
from ppflow_jax.errors import InputError

_SAFETENSORS_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    **{f"I{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype("?"),
}


@dataclass(frozen=True)
class SafetensorsRef:
    """A tensor of a `.safetensors` file; `read()` gives the array."""

    path: str
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Copies this one tensor out of the file. InputError if the file is gone or changed."""
        with _safetensors(self.path) as file:
            return np.asarray(file.get_tensor(self.name))


@contextmanager
def _safetensors(path: str) -> Iterator[Any]:
    """`safe_open` whose errors are one line with the file's name."""
    with one_line_errors(path):
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise InputError("needs the package safetensors: pip install safetensors") from error
        open_regular(path).close()
        try:
            with safe_open(path, framework="numpy") as file:
                yield file
        except SafetensorError as error:
            raise InputError(f"broken ({shown(error)}); download it again") from error


def open_safetensors(path: str | os.PathLike[str]) -> dict[str, SafetensorsRef]:
    """The tensors of a `.safetensors` file by name. InputError if it is broken or not one."""
    path = os.fspath(path)
    refs = {}
    with _safetensors(path) as file:
        for name in file.keys():
            view = file.get_slice(name)
            if view.get_dtype() not in _SAFETENSORS_DTYPES:
                raise InputError(
                    f"tensor {shown(name)} has dtype {view.get_dtype()}; expected one of "
                    f"{', '.join(_SAFETENSORS_DTYPES)}: convert it to F32 or BF16"
                )
            dtype = _SAFETENSORS_DTYPES[view.get_dtype()]
            refs[name] = SafetensorsRef(path, name, dtype, tuple(view.get_shape()))
    return refs


def read_state(path: str | os.PathLike[str]) -> dict[str, TensorRef | SafetensorsRef]:
    """All tensors of a file by their dotted names (`ema.blocks.0.attn.qkv.weight`), unread.

    A name that ends in .safetensors is read as such, every other as a PyTorch file; what is not a
    tensor (epoch, arguments) is left out. Raises InputError as `open_torch_file` does, and if two
    tensors get the same name or there is none.
    """
    if os.fspath(path).endswith(".safetensors"):
        return open_safetensors(path)
    refs = _named("", open_torch_file(path), os.fspath(path), {})
    if not refs:
        raise InputError(f"{path}: has no tensors; expected a checkpoint")
    return refs


def _named(prefix: str, node: Any, path: str, refs: dict[str, TensorRef]) -> dict[str, TensorRef]:
    if isinstance(node, TensorRef):
        if refs.setdefault(prefix, node) is not node:
            raise InputError(f"{path}: two tensors are called {shown(prefix)}; rename one")
    elif isinstance(node, dict | list | tuple):
        children = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in children:
            _named(f"{prefix}.{key}" if prefix else str(key), child, path, refs)
    return refs
