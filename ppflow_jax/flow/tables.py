"""What the programs of a sampler are given and compiled for."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ppflow_jax.flow.method import Method
from ppflow_jax.flow.multistep import Rule
from ppflow_jax.flow.plan import Segment
from ppflow_jax.models.conditions import Cond
from ppflow_jax.models.network import Params

# Of every program of a plan: a row a step, a column an evaluation
Scales = tuple[Float[Array, "_ _"] | Float[np.ndarray, "_ _"], ...]


def unwritten(shape: jax.ShapeDtypeStruct) -> Array:
    """Memory before its first use: numbers that show in any result, unless their weight is 0."""
    fill = jnp.finfo(shape.dtype).max if jnp.issubdtype(shape.dtype, jnp.floating) else 0
    return jnp.full(shape.shape, fill, shape.dtype)


def runs_of(segments: tuple[Segment, ...]) -> list[list[Segment]]:
    """Consecutive segments that differ only in guidance scale; each list is one program."""
    runs: list[list[Segment]] = []
    for s in segments:
        facts = (s.kind, s.stages, s.guided, s.method)
        goes_on = s.kind in ("ode", "multistep", "sde", "jump") and (s.method is None or s.keeps)
        last = runs[-1][-1] if runs else None
        if goes_on and last and facts == (last.kind, last.stages, last.guided, last.method):
            runs[-1].append(s)
        else:
            runs.append([s])
    return runs


def tables_of(run: list[Segment]) -> Tables:
    """Tables of segments that share a program."""
    first = run[0]

    def joined(trees: list[Any]) -> Any:
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *trees)

    return Tables(
        np.float32([first.times[0], *(t for s in run for t in s.times[1:])]),
        np.float32([s.scales for s in run for _ in range(s.steps)]),
        None if first.rows is None else joined([s.rows.tables for s in run]),
        None if first.method is None else joined([s.inputs for s in run]),
        None if first.method is None else np.concatenate([s.full for s in run]),
    )


def scales_of(segments: tuple[Segment, ...]) -> Scales:
    """Guidance scales of every program of a plan; others of the same shapes compile nothing."""
    return tuple(tables_of(run).scales for run in runs_of(segments))


class Networks(NamedTuple):
    """What a network is called with, beside the state and the time.

    Attributes:
      noise: of the images, where known parts are put in their place at every step.
    """

    params: Params
    weak: Params | None
    labels: Cond
    noise: Float[Array, "b h w c"] | None = None


class Tables(NamedTuple):
    """Numbers of every step of a program.

    Attributes:
      times: grid points.
      scales: of guidance.
      rows: weights of a multistep solver.
      inputs, full: of the method.
    """

    times: Float[Array, " points"]
    scales: Float[Array, "steps evaluations"]
    rows: Any = None
    inputs: Any = None
    full: Any = None

    def by_step(self) -> tuple:
        """(start, end, scales, rows, inputs, full), each with a leading axis of steps."""
        return self.times[:-1], self.times[1:], *self[1:]


class Facts(NamedTuple):
    """What a program is compiled for.

    Attributes:
      told: conditions of the network that the sampler supplies (see `models.conditions.SUPPLIED`).
    """

    kind: str
    stages: tuple[int, ...]
    guide: tuple[bool, ...]
    method: Method | None = None
    rule: Rule | None = None
    trajectory: bool = False
    told: tuple[str, ...] = ()
