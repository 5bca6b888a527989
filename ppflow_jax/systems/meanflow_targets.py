"""What the average velocity of an interval should be (see `systems.meanflow`).

`Kind`s of intervals stand for their rows of the batch; the rows of one stage pass the network as
one batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ppflow_jax.flow.path import expand
from ppflow_jax.models.conditions import INTERVAL, LABEL
from ppflow_jax.models.network import Apply, Output, Params
from ppflow_jax.pyramid import Pyramid
from ppflow_jax.systems.meanflow_times import Kind

SHORTEST = 1e-6  # interval across a boundary, whose way is divided by its length


class Rows(NamedTuple):
    """Samples: states, the velocities of their ways, starts and ends of intervals, labels."""

    z: Float[Array, "b h w c"]
    v: Float[Array, "b h w c"]
    t: Float[Array, " b"]
    r: Float[Array, " b"]
    y: Int[Array, " b"]


Intervals = dict[Kind, Rows]
Values = dict[Kind, Float[Array, "_ h w c"]]


def averages(apply: Apply, params: Params, rows: Intervals) -> Values:
    """u(z, t, r) of all rows."""
    return evaluate(apply, params, rows)[1]


def evaluate(apply: Apply, params: Params, rows: Intervals) -> tuple[list[Output], Values]:
    """What the network gives for each stage, and u(z, t, r) of all rows.

    It is one pass over the blocks, in which a stage is one batch.
    """
    stages = tuple(dict.fromkeys(kind.stage for kind in rows))
    batches = [[kind for kind in rows if kind.stage == stage] for stage in stages]
    joined = [Rows(*map(in_turns, zip(*(rows[kind] for kind in batch)))) for batch in batches]
    zs, _, ts, _, _ = zip(*joined)
    ys = tuple({LABEL: own.y, INTERVAL: own.r - own.t} for own in joined)
    outputs = list(apply(params, zs, ts, ys, stages))
    found = {}
    for batch, output in zip(batches, outputs):
        counts = [len(rows[kind].t) for kind in batch]
        found |= dict(zip(batch, by_turns(output.prediction, counts)))
    return outputs, found


def in_turns(parts: tuple[Array, ...]) -> Array:
    """Rows of all parts as one array, in turn, which moves nothing on a mesh."""
    turns = math.gcd(*map(len, parts))
    shaped = [a.reshape(turns, -1, *a.shape[1:]) for a in parts]
    return jnp.concatenate(shaped, axis=1).reshape(-1, *parts[0].shape[1:])


def by_turns(joined: Array, counts: list[int]) -> list[Array]:
    """The parts of `in_turns` from their numbers of rows."""
    turns = math.gcd(*counts)
    shaped = joined.reshape(turns, -1, *joined.shape[1:])
    cuts = [sum(counts[:i]) // turns for i in range(1, len(counts))]
    return [a.reshape(-1, *joined.shape[1:]) for a in jnp.split(shaped, cuts, axis=1)]


def identity_targets(apply: Apply, params: Params, rows: Intervals) -> Values:
    """v + (r - t) D u, with the derivative along v while r is held."""

    def u(moving: dict[Kind, tuple[Array, Array]]) -> Values:
        now = {kind: rows[kind]._replace(z=z, t=t) for kind, (z, t) in moving.items()}
        return averages(apply, params, now)

    start = {kind: (own.z, own.t) for kind, own in rows.items()}
    along = {kind: (own.v, jnp.ones_like(own.t)) for kind, own in rows.items()}
    _, change = jax.jvp(u, (start,), (along,))
    return {kind: own.v + expand(own.r - own.t) * change[kind] for kind, own in rows.items()}


def two_jumps(apply: Apply, params: Params, rows: Intervals, pyramid: Pyramid) -> Values:
    """The average over a jump to the end of the stage and one from there in the next stage."""
    first = {
        kind: own._replace(r=jnp.full_like(own.t, pyramid.stages[kind.stage].t_end))
        for kind, own in rows.items()
    }
    ways = {kind: jump(first[kind], u) for kind, u in averages(apply, params, first).items()}
    second = {
        kind._replace(stage=kind.stage + 1): own._replace(z=own.z + ways[kind], t=first[kind].r)
        for kind, own in rows.items()
    }
    after = averages(apply, params, second)
    found = {}
    for kind, (landed, own) in zip(rows, second.items()):
        length = jnp.maximum(rows[kind].r - rows[kind].t, SHORTEST)
        found[kind] = (ways[kind] + jump(own, after[landed])) / expand(length)
    return found


def jump(own: Rows, u: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """(r - t) u."""
    return expand(own.r - own.t) * u
