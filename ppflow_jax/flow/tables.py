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

# Of every program of a plan: a row a step, a column an evaluation
Scales = tuple[Float[Array, "_ _"] | Float[np.ndarray, "_ _"], ...]


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


def tables_of(run: list[Segment]) -> Tables:
    """Tables of segments that share a program."""
    first = run[0]
    times = np.float32([first.times[0], *(t for s in run for t in s.times[1:])])
    scales = np.float32([s.scales for s in run for _ in range(s.steps)])
    if first.method is None:
        return Tables(times, scales)
    full = np.concatenate([s.full for s in run])
    inputs = jax.tree.map(lambda *a: np.concatenate(a), *(s.inputs for s in run))
    tables = jax.tree.map(padded, Tables(times, scales, inputs, full))
    return tables._replace(steps=len(full))


def scales_of(segments: tuple[Segment, ...]) -> Scales:
    """Guidance scales of every program of a plan; others of the same shapes compile nothing."""
    return tuple(tables_of(run).scales for run in runs_of(segments))


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
