"""Distillation of guided diffusion (arXiv 2210.03142): guidance, then steps, learned by a student.

Stage one, `guided`. The student is told the guidance scale s beside the time, and learns what the
teacher computes from two evaluations,

    v(x, t, y, s) = v_u + s (v_c - v_u),

v_c with the label and v_u with the null class, for s drawn uniformly from a range. It starts from
the teacher's weights; what tells it the scale is zero at first, so that it is the teacher with the
label, without guidance. Guided sampling then takes one evaluation where the teacher takes two.

Stage two, `halved`: progressive distillation (arXiv 2202.00512). A student learns to do in one
step what the teacher, which knows the scale already, does in two halves of it: from z at t to z' at
t', its velocity is that of the straight way, (z' - z) / (t' - t). The grid is the sampler's aligned
one: no step crosses a boundary of the pyramid. The student takes half the steps of the teacher, and
is the teacher of the next round.

The teacher is a network of the student's kind, so that both are one program with other weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ppflow_jax.errors import InputError
from ppflow_jax.flow.grids import aligned_grid
from ppflow_jax.flow.guidance import extrapolate
from ppflow_jax.flow.loss import FlowObjective, OnFlow, over_time, strided
from ppflow_jax.flow.path import Flow, expand, interpolate
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.terms import Batch, Metrics, Weights, network_leaves
from ppflow_jax.models.conditions import GUIDANCE, supplied
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Apply, Params
from ppflow_jax.models.parts import Described
from ppflow_jax.systems.distillation_rows import Rows, asked, counts, ddim, one_step, predict

TEACHER = "teacher"  # what a step is given beside the state


class Draws(NamedTuple):
    """Everything random in one step; `end` is where the step of stage two ends."""

    noise: Float[Array, "b h w c"]
    t: Float[Array, " b"]
    end: Float[Array, " b"]
    labels: Int[Array, " b"]
    scale: Float[Array, " b"]


@dataclass(frozen=True)
class Guided(Described):
    """Settings of stage one.

    Attributes:
      low, high: guidance scales that the student learns; 1 is none.
      channels: 0 guides all; n > 0 only the first n (see `flow.guidance.Cfg`).

    Raises:
      InputError: a range that is none, or channels below 0.
    """

    kind = "guided"
    low: float = 1.0
    high: float = 4.0
    channels: int = 0

    def __post_init__(self):
        _check_range(self)
        if self.channels < 0:
            raise InputError(f"{self}: channels must be at least 0")

    def on(self, base: FlowObjective, model: ModelConfig) -> Distillation:
        """
        Raises:
          InputError: terms, more channels than there are, or a model that is not told the scale.
        """
        _check_student(self, base, model)
        if self.channels > model.channels:
            raise InputError(f"{self}: the model has {model.channels} channels")
        return Distillation(base, self)

    def notes(self, config: SamplerConfig) -> tuple[str, ...]:
        """What a person should know of sampling a student so."""
        return _unknown_scales(self, config)

    def times(self, base: FlowObjective, u: Float[Array, " b"]) -> tuple[Array, Array]:
        """Times of a batch, uniform in each stage, from uniform numbers."""
        t = base.times(u)
        return t, t

    def targets(
        self, base: FlowObjective, apply: Apply, teacher: Params, rows: tuple[Rows, ...]
    ) -> tuple[Float[Array, "_ h w c"], ...]:
        """The teacher's guided predictions, by stage."""
        labelled = predict(apply, teacher, rows, told=False)
        null = [own._replace(y=jnp.full_like(own.y, base.null_label)) for own in rows]
        nothing = predict(apply, teacher, tuple(null), told=False)
        return tuple(
            extrapolate(c, u, expand(own.scale), self.channels)
            for c, u, own in zip(labelled, nothing, rows)
        )


@dataclass(frozen=True)
class Halved(Described):
    """Settings of a round of stage two.

    Attributes:
      steps: of the student; the teacher takes twice as many.
      low, high: guidance scales, within those that the teacher knows.

    Raises:
      InputError: steps below 1, or a range that is none.
    """

    kind = "halved"
    steps: int = 8
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self):
        _check_range(self)
        if self.steps < 1:
            raise InputError(f"{self}: steps must be at least 1")

    def on(self, base: FlowObjective, model: ModelConfig) -> Distillation:
        """
        Raises:
          InputError: another path or prediction than that which Euler's steps are for, terms or
            times, steps that are no halves of the teacher's, or a model that is not told the scale.
        """
        _check_student(self, base, model)
        if base.flow != Flow():
            raise InputError(f"{self} is for path linear and prediction velocity")
        if base.stage_times:
            raise InputError(f"{self} trains the sampler's times: leave flow.stage_times empty")
        mine, theirs = (counts(n, base.pyramid) for n in (self.steps, 2 * self.steps))
        if theirs != [2 * n for n in mine]:
            raise InputError(
                f"{self}: {2 * self.steps} steps are not twice {self.steps} in every stage "
                f"({theirs} and {mine}): choose steps that the durations of the stages divide"
            )
        return Distillation(base, self)

    def notes(self, config: SamplerConfig) -> tuple[str, ...]:
        """
        Raises:
          InputError: other steps than those that the student has learned.
        """
        if (config.solver, config.steps, config.grid) != ("euler", self.steps, "aligned"):
            raise InputError(
                f"the model was distilled to {self.steps} steps, and knows no others: choose "
                f"solver=euler and steps={self.steps}, not {config.solver} and {config.steps}"
            )
        return _unknown_scales(self, config)

    def times(self, base: FlowObjective, u: Float[Array, " b"]) -> tuple[Array, Array]:
        """Starts and ends of steps, any of its stage with equal probability."""
        grid = aligned_grid(0.0, 1.0, self.steps, base.pyramid)
        number = np.asarray(counts(self.steps, base.pyramid))
        before = np.cumsum(number) - number
        repeats = len(u) // len(base.pattern)
        first, many = (np.tile(a[list(base.pattern)], repeats) for a in (before, number))
        step = first + jnp.minimum(jnp.int32(u * many), many - 1)
        return jnp.asarray(grid)[step], jnp.asarray(grid)[step + 1]

    def targets(
        self, base: FlowObjective, apply: Apply, teacher: Params, rows: tuple[Rows, ...]
    ) -> tuple[Float[Array, "_ h w c"], ...]:
        """Velocities that end where two steps of the teacher do, by stage."""
        path, now = base.flow.interpolant, rows
        for part in (0.5, 1.0):
            ends = [own.t + part * (own.end - own.t) for own in rows]
            velocities = predict(apply, teacher, now)
            now = tuple(
                at._replace(z=ddim(path, v, at.z, at.t, end), t=end)
                for at, v, end in zip(now, velocities, ends)
            )
        return tuple(one_step(path, own.z, own.t, at.z, own.end) for own, at in zip(rows, now))


@dataclass(frozen=True)
class Distillation(OnFlow):
    """A student and its teacher, `frozen["teacher"]`.

    Attributes:
      base: stages and their times, null class, label drop.
      settings: what the teacher is asked for.
    """

    base: FlowObjective
    settings: Guided | Halved

    frozen = (TEACHER,)

    @property
    def evaluated(self) -> tuple[int, ...]:
        """The teacher, twice."""
        return self.pattern * 2

    def fields(self, weights: Weights) -> tuple[str, ...]:
        return ()

    def draw(self, key: Key[Array, ""], batch: Batch) -> Draws:
        """Noise, times, dropped labels and guidance scales of one step."""
        drawn = self.base.draw(key, batch)
        k_time, k_scale = jax.random.split(jax.random.fold_in(key, 1))
        t, end = self.settings.times(self.base, jax.random.uniform(k_time, drawn.t.shape))
        low, high = self.settings.low, self.settings.high
        scale = jax.random.uniform(k_scale, drawn.t.shape, minval=low, maxval=high)
        return Draws(drawn.noise, t, end, drawn.labels, scale)

    def loss(
        self,
        apply: Apply,
        params: Params,
        frozen: Mapping[str, Any],
        batch: Batch,
        draws: Draws,
        weights: Weights,
    ) -> tuple[Float[Array, ""], Metrics]:
        """The mean squared difference between student and target, over time as `FlowObjective`."""
        path = self.base.flow.interpolant
        z, _ = interpolate(path, draws.noise, batch["x"], draws.t)
        stages, every = range(len(self.base.pyramid)), Rows(z, *draws[1:])
        rows = tuple(Rows(*(strided(a, self.pattern, s) for a in every)) for s in stages)
        teacher = jax.lax.stop_gradient(frozen[TEACHER])
        targets = self.settings.targets(self.base, apply, teacher, rows)
        outputs = apply(network_leaves(params), *asked(rows))
        losses = [
            jnp.mean(jnp.square(output.prediction - target), axis=(1, 2, 3))
            for output, target in zip(outputs, targets)
        ]
        return over_time(self.base.pyramid, losses, outputs, weights)


def _check_range(settings: Guided | Halved) -> None:
    if not 0 <= settings.low <= settings.high < np.inf:
        raise InputError(f"{settings}: scales must be 0 <= low <= high")


def _check_student(settings: Guided | Halved, base: FlowObjective, model: ModelConfig) -> None:
    if base.terms or base.conditions:
        raise InputError(
            f"objective {settings.kind} has no terms or tasks: leave config.flow.terms and "
            "config.data.task out"
        )
    if GUIDANCE not in supplied(model.conditions):
        raise InputError(
            f"objective {settings.kind} needs a model that is told the guidance scale: set "
            "config.model.conditions to ('scalar:name=guidance',)"
        )


def _unknown_scales(settings: Guided | Halved, config: SamplerConfig) -> tuple[str, ...]:
    low, high = settings.low, settings.high
    return tuple(
        f"guidance {s:g} is outside {low:g} to {high:g}, on which the model was distilled"
        for s in config.cfg
        if s != 1 and not low <= s <= high
    )
