"""Safetensors files: their tensors, unread."""

from __future__ import annotations

import json
import os
from math import prod

import numpy as np

from ppflow_jax.convert.placeholder import Placeholder, unreadable
from ppflow_jax.convert.tensors import (
    BFLOAT16,
    FLOAT8,
    Storage,
    TensorRef,
    contiguous,
    shown,
    tensor_ref,
)
from ppflow_jax.convert.torch_file import one_line_errors, open_regular
from ppflow_jax.errors import InputError

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "F8_E4M3": FLOAT8["float8_e4m3fn"],
    "F8_E5M2": FLOAT8["float8_e5m2"],
    "F8_E4M3FNUZ": FLOAT8["float8_e4m3fnuz"],
    "F8_E5M2FNUZ": FLOAT8["float8_e5m2fnuz"],
    "C64": np.dtype("<c8"),
    **{f"I{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype("?"),
}


def open_safetensors(path: str | os.PathLike[str]) -> dict[str, TensorRef | Placeholder]:
    """The tensors of a `.safetensors` file by name. InputError if it is broken or not one."""
    path = os.fspath(path)
    with one_line_errors(path):
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise InputError("needs the package safetensors: pip install safetensors") from error
        with open_regular(path) as file:
            try:
                # checks that the header is one, and that its tensors fill the file
                with safe_open(path, framework="numpy"):
                    pass
            except SafetensorError as error:
                raise InputError(f"broken ({shown(error)}); download it again") from error
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _ref(path, size, 8 + length, name, entry) for name, entry in header.items()}


def _ref(path: str, size: int, begin: int, name: str, entry: dict) -> TensorRef | Placeholder:
    if entry["dtype"] not in _DTYPES:
        return unreadable(f"a tensor of dtype {shown(entry['dtype'])}")
    shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
    storage = Storage(path, size, name, _DTYPES[entry["dtype"]], prod(shape))
    storage.place(begin + first, last - first)
    return tensor_ref(storage, 0, shape, contiguous(shape))
