"""MeanFlow (arXiv 2505.13447): a network of average velocities, for one or a few evaluations.

With z_t on the way from noise (t = 0) to data (t = 1) and v = dz_t/dt, the average velocity of the
interval [t, r], r >= t, is u(z_t, t, r) = 1/(r - t) times the integral of v from t to r. One
evaluation jumps over the interval:

    z_r = z_t + (r - t) u(z_t, t, r).

Differentiating (r - t) u along the way, r being held, gives the identity that is trained, with v
along the way of the sample in the place of the expected one (Eq. 6; the paper's time runs the other
way, which turns its minus into a plus):

    u(z_t, t, r) = v + (r - t) du/dt,   du/dt = v du/dz + du/dt at fixed z,

where the right side has no gradient. The derivative is one forward-mode product. The network is
told r - t beside t.

The pyramid. The patch of an evaluation belongs to the stage of its start t, so that one evaluation
over [0, 1] is wholly on the coarsest patch. For r in the same stage the identity is all that there
is to say. For r in a later stage it leaves a constant open, since a stage never sees t come up to
r; there the target is two jumps, one to the end b of the stage and one from there by the next
stage's patch:

    (r - t) u(z_t, t, r) = (b - t) u(z_t, t, b) + (r - b) u(z_b, b, r).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import strided
from ppflow_jax.flow.path import LINEAR, expand, interpolate
from ppflow_jax.models.network import Apply, Params
from ppflow_jax.pyramid import Pyramid
from ppflow_jax.systems.meanflow_times import (
    ACROSS,
    LOGIT_NORMAL,
    POINT,
    WITHIN,
    Kind,
    Times,
    kinds_of,
    pairs,
)

INTERVAL = "interval"  # the condition that has r - t
SHORTEST = 1e-6  # interval across a boundary, whose way is divided by its length


class Draws(NamedTuple):
    """Everything random in one step."""

    noise: Float[Array, "b h w c"]
    t: Float[Array, " b"]
    r: Float[Array, " b"]
    labels: Int[Array, " b"]


class Rows(NamedTuple):
    """Samples: states, the velocities of their ways, starts and ends of intervals, labels."""

    z: Float[Array, "b h w c"]
    v: Float[Array, "b h w c"]
    t: Float[Array, " b"]
    r: Float[Array, " b"]
    y: Int[Array, " b"]


Intervals = dict[Kind, Rows]
Values = dict[Kind, Float[Array, "_ h w c"]]


@dataclass(frozen=True)
class MeanFlow:
    """The objective.

    Attributes:
      points: share of samples with r = t, on which the network learns the velocity itself.
      times: of which both ends of an interval are drawn.
      omega, kappa: guidance inside the target (Sec. 4.2 and Eq. 20): the velocity is
        omega v + kappa u(z, t, t | y) + (1 - omega - kappa) u(z, t, t | null), which guides with a
        scale of omega / (1 - kappa). Samples whose label is dropped keep v.
      power, constant: a sample's squared error e counts 1 / (e + constant)^power (Eq. 22).

    Raises:
      InputError: a value out of its range.
    """

    pyramid: Pyramid
    null_label: int
    label_drop: float = 0.1
    points: float = 0.75
    times: Times = LOGIT_NORMAL
    omega: float = 1.0
    kappa: float = 0.0
    power: float = 1.0
    constant: float = 1e-3

    def __post_init__(self):
        if not (0 <= self.points <= 1 and 0 <= self.label_drop <= 1):
            raise InputError(
                f"points {self.points} and label_drop {self.label_drop} must be in [0, 1]"
            )
        if not (self.omega > 0 and 0 <= self.kappa < 1):
            raise InputError(
                f"guidance omega={self.omega}, kappa={self.kappa}: omega must be above 0, kappa at "
                "least 0 and below 1"
            )
        if not (self.power >= 0 and self.constant > 0):
            raise InputError(
                f"power {self.power} must be at least 0 and constant {self.constant} above 0"
            )

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return kinds_of(self.pyramid, self.times, self.points)

    @property
    def pattern(self) -> tuple[int, ...]:
        """Stage of sample i is `pattern[i % len(pattern)]`."""
        return tuple(kind.stage for kind in self.kinds for _ in range(kind.rows))

    def draw(
        self, key: Key[Array, ""], x1: Float[Array, "b h w c"], labels: Int[Array, " b"]
    ) -> Draws:
        """Noise, intervals and dropped labels of one step."""
        k_noise, k_time, k_drop = jax.random.split(key, 3)
        uniform = jax.random.uniform(k_time, (2, len(x1)))
        dropped = jax.random.uniform(k_drop, (len(x1),)) < self.label_drop
        return Draws(
            jax.random.normal(k_noise, x1.shape),
            *pairs(self.pyramid, self.times, self.kinds, uniform),
            jnp.where(dropped, self.null_label, labels),
        )

    def loss(
        self, apply: Apply, params: Params, x1: Float[Array, "b h w c"], draws: Draws
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """What is minimised, and metrics: `loss`, it, and `mse`, the mean squared error of u.

        Both are means over intervals, in which each kind counts by its probability. With a power
        of 1 the loss is near 1 from the first step to the last, and `mse` says more.
        """
        z, v = interpolate(LINEAR, draws.noise, x1, draws.t)
        rows = self.by_kind(Rows(z, v, draws.t, draws.r, draws.labels))
        targets = self.targets(apply, jax.lax.stop_gradient(params), rows)
        loss = mse = jnp.zeros(())
        for kind, u in averages(apply, params, rows).items():
            target = jax.lax.stop_gradient(targets[kind])
            squares = jnp.sum(jnp.square(u - target), axis=(1, 2, 3))
            weight = (jax.lax.stop_gradient(squares) + self.constant) ** -self.power
            loss += kind.weight * jnp.mean(weight * squares)
            mse += kind.weight * jnp.mean(squares) / u[0].size
        return loss, {"loss": loss, "mse": mse}

    def by_kind(self, rows: Rows) -> Intervals:
        """The rows of a batch, by kind."""
        numbers = tuple(i for i, kind in enumerate(self.kinds) for _ in range(kind.rows))
        return {
            kind: Rows(*(strided(a, numbers, i) for a in rows)) for i, kind in enumerate(self.kinds)
        }

    def targets(self, apply: Apply, params: Params, rows: Intervals) -> Values:
        """What u should be."""
        moving = {kind: own for kind, own in rows.items() if kind.name != ACROSS}
        guided = self.guided(apply, params, moving)
        within = {kind: own for kind, own in guided.items() if kind.name == WITHIN}
        across = {kind: own for kind, own in rows.items() if kind.name == ACROSS}
        return (
            {kind: own.v for kind, own in guided.items() if kind.name == POINT}
            | (identity_targets(apply, params, within) if within else {})
            | (two_jumps(apply, params, across, self.pyramid) if across else {})
        )

    def guided(self, apply: Apply, params: Params, rows: Intervals) -> Intervals:
        """The same rows with guided velocities."""
        if self.omega == 1 and self.kappa == 0:
            return rows
        now = {kind: own._replace(r=own.t) for kind, own in rows.items()}
        null = {
            kind: own._replace(y=jnp.full_like(own.y, self.null_label)) for kind, own in now.items()
        }
        nothing = averages(apply, params, null)
        labelled = averages(apply, params, now) if self.kappa else nothing

        def velocity(kind: Kind, own: Rows) -> Array:
            rest = (1 - self.omega - self.kappa) * nothing[kind]
            guided = self.omega * own.v + self.kappa * labelled[kind] + rest
            dropped = (own.y == self.null_label)[:, None, None, None]
            return jnp.where(dropped, own.v, guided)

        return {kind: own._replace(v=velocity(kind, own)) for kind, own in rows.items()}


def averages(apply: Apply, params: Params, rows: Intervals) -> Values:
    """u(z, t, r) of all rows, in one pass over the blocks in which a stage is one batch."""
    stages = tuple(dict.fromkeys(kind.stage for kind in rows))
    batches = [[kind for kind in rows if kind.stage == stage] for stage in stages]
    joined = [Rows(*map(in_turns, zip(*(rows[kind] for kind in batch)))) for batch in batches]
    zs, _, ts, _, _ = zip(*joined)
    ys = tuple({"label": own.y, INTERVAL: own.r - own.t} for own in joined)
    found = {}
    for batch, output in zip(batches, apply(params, zs, ts, ys, stages)):
        counts = [len(rows[kind].t) for kind in batch]
        found |= dict(zip(batch, by_turns(output.prediction, counts)))
    return found


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
    """v + (r - t) du/dt (Eq. 10), the derivative along v with r held."""

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
