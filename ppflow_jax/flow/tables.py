"""What the programs of a sampler are given and compiled for."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ppflow_jax.flow.method import Method
from ppflow_jax.flow.plan import Segment
from ppflow_jax.models.network import Params


def unwritten(shape: jax.ShapeDtypeStruct) -> Array:
    """Memory before its first use: numbers that show in any result, unless their weight is 0."""
    fill = jnp.finfo(shape.dtype).max if jnp.issubdtype(shape.dtype, jnp.floating) else 0
    return jnp.full(shape.shape, fill, shape.dtype)


def row(tables: Any, k: Int[Array, ""] | int) -> Any:
    """Row k of every table; that k is not negative saves code."""
    row = partial(jax.lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
    return jax.tree.map(lambda table: row(table, k), tables)


def padded(table: np.ndarray) -> np.ndarray:
    """The last row repeated up to a multiple of 64: plans of any length share one program."""
    return np.pad(table, [(0, -len(table) % 64), *[(0, 0)] * (table.ndim - 1)], mode="edge")


def runs_of(segments: tuple[Segment, ...]) -> list[list[Segment]]:
    """Consecutive segments that differ only in guidance scale; each list is one program."""
    runs: list[list[Segment]] = []
    for s in segments:
        facts = (s.kind, s.stages, s.guided, s.method)
        goes_on = s.kind in ("ode", "sde") and (s.method is None or s.keeps)
        last = runs[-1][-1] if runs else None
        if goes_on and last and facts == (last.kind, last.stages, last.guided, last.method):
            runs[-1].append(s)
        else:
            runs.append([s])
    return runs


class Networks(NamedTuple):
    """What a network is called with, beside the state and the time."""

    params: Params
    weak: Params | None
    labels: Int[Array, " b"]


class Tables(NamedTuple):
    """Numbers of every step of a program: grid points, guidance scales, inputs of its method."""

    times: Float[Array, " points"]
    scales: Float[Array, "steps evaluations"]
    inputs: Any = None
    full: Any = None
    steps: Any = None


class Facts(NamedTuple):
    """What a program is compiled for."""

    kind: str
    stages: tuple[int, ...]
    guide: tuple[bool, ...]
    method: Method | None
    trajectory: bool
