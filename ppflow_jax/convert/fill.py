"""Filling a parameter tree from a state dict: strict, and all mismatches reported together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ppflow_jax.convert.load import DTYPES
from ppflow_jax.errors import InputError

State = Mapping[str, Any]
Params = dict[str, Any]


def leaves(params: Params) -> Iterator[tuple[str, Any]]:
    """Dotted path and leaf."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def fill(
    target: Params,
    table: Mapping[str, Mapping[str, str]],
    state: State,
    what: object,
    *,
    dropped: Callable[[str], object],
    check: Callable[[str, np.ndarray], str | None] = lambda path, value: None,
) -> Params:
    """Parameters (nested dict of float32 NumPy arrays) of the shapes of `target`.

    Every key is used or `dropped`, every parameter is filled exactly once, shapes agree, values
    are finite.

    Args:
      target: shapes.
      table: our dotted path -> its PyTorch name in every naming.
      state: arrays in PyTorch's layout, by name.
      what: the architecture, for the message.
      dropped: whether a name is deliberately left out.
      check: what is wrong with a value, beyond that.

    Raises:
      InputError: all mismatches in one line.
    """
    problems, used, filled = [], set(), {}
    for path, leaf in leaves(target):
        # namings share most names; keep each once
        names = list(dict.fromkeys(table[path].values()))
        found = [name for name in names if name in state]
        used.update(found)
        if len(found) != 1:
            given = f"given {len(found)} times ({', '.join(found)})" if found else "missing"
            problems.append(f"{names[0]}: {given}")
            continue
        array = np.asarray(state[found[0]])
        if array.dtype not in DTYPES:
            problems.append(f"{found[0]}: dtype {array.dtype}, expected a floating-point one")
            continue
        value = _from_torch(array, leaf.shape)
        if value is None:
            expected = _torch_shape(leaf.shape)
            problems.append(f"{found[0]}: shape {array.shape}, expected {expected}")
        elif not np.isfinite(value).all():
            problems.append(f"{found[0]}: has values that are not finite")
        elif problem := check(path, value):
            problems.append(f"{found[0]}: {problem}")
        else:
            filled[path] = value
    problems += [f"{key}: not expected" for key in state if key not in used and not dropped(key)]
    if problems or not filled:
        raise InputError(
            f"these weights do not fit {what} ({len(problems)} mismatches): "
            + "; ".join(problems or ["no weights"])
        )
    return _unflatten(filled)


def to_torch(array: np.ndarray) -> np.ndarray:
    """OIHW of an HWIO convolution, OI of an IO matrix, vectors as they are."""
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T)


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


def _from_torch(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Float32 in our layout, or None where the shape does not fit."""
    if len(shape) == 2 and array.ndim == 4 and array.shape[2:] == (1, 1):
        array = array[:, :, 0, 0]  # attention stored as 1x1 convolution
    if array.shape != _torch_shape(shape):
        return None
    array = array.astype(np.float32)
    array = array.transpose(2, 3, 1, 0) if len(shape) == 4 else array.T
    return np.ascontiguousarray(array)


def _unflatten(flat: Mapping[str, np.ndarray]) -> Params:
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree
