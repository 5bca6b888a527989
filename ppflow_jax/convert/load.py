"""Parameters from a PyTorch state dict: strict, one tensor in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ppflow_jax.convert.keys import key_table, position_names, position_values
from ppflow_jax.convert.tensors import BFLOAT16
from ppflow_jax.errors import InputError
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.leaves import Key
from ppflow_jax.models.network import Params, abstract_params

DTYPES = (np.dtype("f4"), np.dtype("f8"), np.dtype("f2"), BFLOAT16)
EXACT = 1e-6
# A trainer whose EMA covers the fixed positions too lets them drift by rounding: with decay
# 0.9999 in float32 by up to 1.7e-4. Positions of any other kind are off by 0.01 at least.
DRIFTED = 1e-3


@dataclass(frozen=True)
class Loaded:
    """Parameters in the dtypes of the file, and its positions where they are not bitwise ours.

    `drift` is the largest difference of a position beyond what its dtype explains.
    """

    params: Params
    positions: dict[int, np.ndarray]
    drift: float


def load_state(
    config: ModelConfig,
    state: Mapping[str, Any],
    *,
    dtype: np.dtype | None = None,
    on_tensor: Callable[[], object] = lambda: None,
) -> Loaded:
    """Fill every parameter exactly once and use every tensor of `state`.

    Args:
      config: architecture to fill.
      state: arrays, or things with `shape`, `dtype` and `read()`, by PyTorch name.
      dtype: of the parameters; None keeps that of each tensor.
      on_tensor: called after each tensor.

    Raises:
      InputError: anything missing, not expected, of another shape, no floating-point number,
        not finite, or positions other than ours: all of it in one line.
    """
    problems: list[tuple[str, str]] = []
    groups: dict[tuple, list[Key]] = {}
    for entry in key_table(config):
        groups.setdefault(entry.path, []).append(entry)
    leaves = _leaves(abstract_params(config))
    if groups.keys() != leaves.keys():
        raise AssertionError(f"key table and network differ: {groups.keys() ^ leaves.keys()}")

    params: Params = {}
    for path, entries in groups.items():
        *parents, last = path
        node = params
        for part in parents:
            node = node.setdefault(part, {})
        value = _leaf(entries, leaves[path].shape, state, dtype, problems, on_tensor)
        node[last] = value
    names = position_names(config)
    used = {e.torch for entries in groups.values() for e in entries} | set(names)
    problems += [(name, "not expected") for name in state if name not in used]

    kept, drift = {}, 0.0
    for stage, name in enumerate(names):
        if name in state:
            value, error = _positions(config, stage, state[name], name, problems)
            drift = max(drift, error)
            if value is not None:
                kept[stage] = value
            on_tensor()
    if problems:
        raise InputError(
            f"{len(problems)} tensors do not fit a model of stages {config.pyramid}, width "
            f"{config.width}, depth {config.depth}, {config.num_classes} classes: "
            f"{_listed(problems)}; nothing was written"
        )
    return Loaded(params, kept, drift)


def from_torch(config: ModelConfig, state: Mapping[str, Any]) -> Params:
    """Our parameters from the tensors of a PyTorch state dict; see `load_state`."""
    return load_state(config, state).params


def _read(tensor: Any) -> np.ndarray:
    return tensor.read() if hasattr(tensor, "read") else np.asarray(tensor)


def _leaf(entries, shape, state, dtype, problems, on_tensor) -> np.ndarray | None:
    """One of our leaves; layers and experts go straight into their place in the stack."""
    indices, axes = [e.index for e in entries], len(entries[0].index)
    if sorted(indices) != list(np.ndindex(shape[:axes])):
        raise AssertionError(f"key table fills {indices} of a leaf of shape {shape}")
    one = shape[axes:]
    expected = entries[0].theirs(np.broadcast_to(np.int8(0), one)).shape
    fitting = []
    for entry in entries:
        tensor = state.get(entry.torch)
        if tensor is None:
            problems.append((entry.torch, "missing"))
        elif tuple(tensor.shape) != expected:
            problems.append((entry.torch, f"shape {tuple(tensor.shape)}, expected {expected}"))
        elif np.dtype(tensor.dtype) not in DTYPES:
            problems.append((entry.torch, f"dtype {tensor.dtype}, expected a floating-point one"))
        else:
            fitting.append((entry, tensor))
    dtypes = sorted({str(np.dtype(t.dtype)) for _, t in fitting})
    if dtype is None and len(dtypes) > 1:
        name = entries[0].torch
        problems.append((name, f"layers of dtypes {' and '.join(dtypes)}: give --dtype=float32"))
    if not fitting:
        return None
    out = np.empty(shape, dtype or fitting[0][1].dtype)
    for entry, tensor in fitting:
        value = _read(tensor)
        target = out[entry.index]
        with np.errstate(over="ignore"):
            target[...] = entry.ours(value)
        if not np.isfinite(value).all():
            problems.append((entry.torch, "has values that are NaN or infinite"))
        elif value.dtype != out.dtype and not np.isfinite(target).all():
            problems.append((entry.torch, f"has values too large for {out.dtype}"))
        on_tensor()
    return out


def _positions(config, stage, tensor, name, problems) -> tuple[np.ndarray | None, float]:
    """The file's positions if they are not bitwise ours, and how far they are beyond rounding."""
    ours = position_values(config, stage)
    if tuple(tensor.shape) != ours.shape:
        problems.append((name, f"shape {tuple(tensor.shape)}, expected {ours.shape}"))
        return None, 0.0
    if np.dtype(tensor.dtype) not in DTYPES:
        problems.append((name, f"dtype {tensor.dtype}, expected a floating-point one"))
        return None, 0.0
    theirs = _read(tensor)
    if theirs.dtype == ours.dtype and np.array_equal(theirs, ours):
        return None, 0.0
    rounding = float(ml_dtypes.finfo(theirs.dtype).eps) / 2
    error = float(np.max(np.abs(theirs.astype(np.float64) - ours))) - rounding
    if not error <= DRIFTED:  # NaN too
        problems.append(
            (name, f"differs by {error:.2g} from the sin-cos positions of this pyramid")
        )
    return theirs, max(error, 0.0)


def _leaves(tree: Any, path: tuple = ()) -> dict[tuple, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key, node in tree.items() for k, v in _leaves(node, (*path, key)).items()}


def _listed(problems: list[tuple[str, str]]) -> str:
    """One line; what is the same in several blocks is said once."""
    found: dict[tuple[str, str], list[int]] = {}
    for name, text in problems:
        block = re.match(r"(\w+)\.(\d+)\.", name)
        common = f"{block[1]}.*.{name[block.end() :]}" if block else name
        found.setdefault((common, text), []).extend([int(block[2])] if block else [])
    parts = []
    for (name, text), blocks in found.items():
        if blocks:
            first, last = min(blocks), max(blocks)
            whole = len(set(blocks)) == last - first + 1 and last > first
            which = f"{{{first}..{last}}}" if whole else ",".join(map(str, sorted(blocks)))
            name = name.replace("*", which, 1)
        parts.append(f"{name}: {text}")
    return "; ".join(parts)
