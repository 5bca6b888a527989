"""MeanFlow (arXiv 2505.13447): a network of average velocities, for one or a few evaluations.

With z_t on the way from noise (t = 0) to data (t = 1) and v = dz_t/dt, the average velocity of the
interval [t, r], r >= t, is u(z_t, t, r) = 1/(r - t) times the integral of v from t to r. One
evaluation jumps over the interval:

    z_r = z_t + (r - t) u(z_t, t, r).

Differentiating (r - t) u along the way, r being held, gives the identity that is trained, with v
along the way of the sample in the place of the expected one (Sec. 4.1; the paper's time runs the
other way, which turns its minus into a plus):

    u(z_t, t, r) = v + (r - t) D u,

where D is the derivative along the way, by v in z and by 1 in t: one forward-mode product. The
right side has no gradient. The network is told r - t beside t.

The pyramid. The patch of an evaluation belongs to the stage of its start t, so that one evaluation
over [0, 1] is wholly on the coarsest patch. For r in the same stage the identity is all that there
is to say. For r in a later stage it leaves a constant open, since a stage never sees t come up to
r; there the target is two jumps, one to the end b of the stage and one from there by the next
stage's patch:

    (r - t) u(z_t, t, r) = (b - t) u(z_t, t, b) + (r - b) u(z_b, b, r).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import LINEAR, Flow, interpolate
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.strata import check_batch, strided, with_block_terms
from ppflow_jax.flow.terms import Batch, Metrics, Weights, network_leaves
from ppflow_jax.models.conditions import INTERVAL, supplied
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Apply, Params
from ppflow_jax.models.parts import Described
from ppflow_jax.pyramid import Pyramid
from ppflow_jax.systems.meanflow_targets import (
    Intervals,
    Rows,
    Values,
    averages,
    evaluate,
    identity_targets,
    two_jumps,
)
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


class Draws(NamedTuple):
    """Everything random in one step."""

    noise: Float[Array, "b h w c"]
    t: Float[Array, " b"]
    r: Float[Array, " b"]
    labels: Int[Array, " b"]


@dataclass(frozen=True)
class MeanFlow(Described):
    """Settings of the objective, as configurations have them.

    Attributes:
      points: share of samples with r = t, on which the network learns the velocity itself.
      times, mean, std: distribution of both ends of an interval, see `meanflow_times.Times`.
      omega, kappa: guidance inside the target (Sec. 4.2, and the appendix for kappa): v is
        omega v + kappa u(z, t, t | y) + (1 - omega - kappa) u(z, t, t | null), which guides with a
        scale of omega / (1 - kappa). Samples whose label is dropped keep v.
      power, constant: a sample's squared error e counts 1 / (e + constant)^power (Sec. 4.3).

    Raises:
      InputError: a value out of its range.
    """

    kind = "meanflow"
    points: float = 0.75
    times: str = LOGIT_NORMAL.name
    mean: float = LOGIT_NORMAL.mean
    std: float = LOGIT_NORMAL.std
    omega: float = 1.0
    kappa: float = 0.0
    power: float = 1.0
    constant: float = 1e-3

    def __post_init__(self):
        if not 0 <= self.points <= 1:
            raise InputError(f"{self}: points must be in [0, 1]")
        if not (self.omega > 0 and 0 <= self.kappa < 1):
            raise InputError(f"{self}: omega must be above 0, kappa at least 0 and below 1")
        if not (self.power >= 0 and self.constant > 0):
            raise InputError(f"{self}: power must be at least 0, constant above 0")
        Times(self.times, self.mean, self.std)

    @property
    def guides(self) -> bool:
        """Whether guidance is inside the averages."""
        return (self.omega, self.kappa) != (1, 0)

    def notes(self, config: SamplerConfig) -> tuple[str, ...]:
        """What a person should know of sampling so.

        Raises:
          InputError: guidance on top of that which is inside.
        """
        if self.guides and set(config.cfg) != {1.0}:
            raise InputError(
                f"the model was trained with a guidance of {self.omega / (1 - self.kappa):g} "
                f"inside: leave cfg out, not {','.join(f'{s:g}' for s in config.cfg)}"
            )
        return ()

    def on(self, base: FlowObjective, model: ModelConfig) -> MeanFlowObjective:
        """The objective of a model, `base` with the identity in the place of the velocity.

        Raises:
          InputError: another path or prediction, stages of other times or shares, terms, or a
            model that is not told the interval.
        """
        if base.flow != Flow():
            raise InputError("objective meanflow is for path linear and prediction velocity")
        if base.stage_times or base.stage_share or base.terms or base.conditions:
            raise InputError(
                "objective meanflow draws times of its own and has no terms or tasks: leave "
                "config.flow.stage_times, stage_share, terms and config.data.task out"
            )
        if INTERVAL not in supplied(model.conditions):
            raise InputError(
                "objective meanflow needs a model that is told the interval: set "
                "config.model.conditions to ('scalar:name=interval,scale=1',)"
            )
        return MeanFlowObjective(base, self)


@dataclass(frozen=True)
class MeanFlowObjective:
    """What is minimised.

    Attributes:
      base: stages, null class and label drop.
    """

    base: FlowObjective
    settings: MeanFlow

    frozen = ()
    forward_mode = True

    @property
    def evaluated(self) -> tuple[int, ...]:
        """Velocities for guidance, two passes for a derivative, two jumps."""
        guides = self.settings.guides + (self.settings.kappa > 0)
        found: list[int] = []
        for kind in self.kinds:
            more = {POINT: [], WITHIN: [kind.stage] * 2, ACROSS: [kind.stage, kind.stage + 1]}
            now = [kind.stage] * (guides if kind.name != ACROSS else 0)
            found += (more[kind.name] + now) * kind.rows
        return tuple(found)

    @property
    def pyramid(self) -> Pyramid:
        return self.base.pyramid

    @property
    def times(self) -> Times:
        return Times(self.settings.times, self.settings.mean, self.settings.std)

    @functools.cached_property
    def kinds(self) -> tuple[Kind, ...]:
        return kinds_of(self.pyramid, self.times, self.settings.points)

    @property
    def pattern(self) -> tuple[int, ...]:
        """Stage of sample i is `pattern[i % len(pattern)]`."""
        return tuple(kind.stage for kind in self.kinds for _ in range(kind.rows))

    def check_batch(self, batch_size: int, shards: int) -> None:
        """See `FlowObjective.check_batch`."""
        rows = f"the {len(self.pattern)} rows of objective meanflow"
        check_batch(self.pattern, batch_size, shards, rows)

    def init(self, model: ModelConfig, key: Key[Array, ""]) -> Params:
        return {}

    def fields(self, weights: Weights) -> tuple[str, ...]:
        return ()

    def draw(self, key: Key[Array, ""], batch: Batch) -> Draws:
        """Noise, intervals and dropped labels of one step."""
        x1, labels = batch["x"], batch["label"]
        k_noise, k_time, k_drop = jax.random.split(key, 3)
        uniform = jax.random.uniform(k_time, (2, len(x1)))
        dropped = jax.random.uniform(k_drop, (len(x1),)) < self.base.label_drop
        return Draws(
            jax.random.normal(k_noise, x1.shape),
            *pairs(self.pyramid, self.times, self.kinds, uniform),
            jnp.where(dropped, self.base.null_label, labels),
        )

    def loss(
        self,
        apply: Apply,
        params: Params,
        frozen: Mapping[str, Any],
        batch: Batch,
        draws: Draws,
        weights: Weights,
    ) -> tuple[Float[Array, ""], Metrics]:
        """What is minimised, and metrics: `loss`, it, and `mse`, the mean squared error of u.

        Both are means over intervals, in which each kind counts by its probability. With a power
        of 1 the loss is near 1 from the first step to the last, and `mse` says more. Terms of the
        blocks are added as in `FlowObjective`.
        """
        params = network_leaves(params)
        z, v = interpolate(LINEAR, draws.noise, batch["x"], draws.t)
        rows = self.by_kind(Rows(z, v, draws.t, draws.r, draws.labels))
        targets = self.targets(apply, jax.lax.stop_gradient(params), rows)
        outputs, averages = evaluate(apply, params, rows)
        loss = mse = jnp.zeros(())
        for kind, u in averages.items():
            target = jax.lax.stop_gradient(targets[kind])
            squares = jnp.sum(jnp.square(u - target), axis=(1, 2, 3))
            constant, power = self.settings.constant, self.settings.power
            weight = (jax.lax.stop_gradient(squares) + constant) ** -power
            loss += kind.weight * jnp.mean(weight * squares)
            mse += kind.weight * jnp.mean(squares) / u[0].size
        total, terms = with_block_terms(loss, self.pyramid, outputs, weights)
        return total, terms | {"loss": loss, "mse": mse}

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
        settings, null_label = self.settings, self.base.null_label
        if not settings.guides:
            return rows
        now = {kind: own._replace(r=own.t) for kind, own in rows.items()}
        null = {kind: own._replace(y=jnp.full_like(own.y, null_label)) for kind, own in now.items()}
        nothing = averages(apply, params, null)
        labelled = averages(apply, params, now) if settings.kappa else nothing

        def velocity(kind: Kind, own: Rows) -> Array:
            rest = (1 - settings.omega - settings.kappa) * nothing[kind]
            guided = settings.omega * own.v + settings.kappa * labelled[kind] + rest
            dropped = (own.y == null_label)[:, None, None, None]
            return jnp.where(dropped, own.v, guided)

        return {kind: own._replace(v=velocity(kind, own)) for kind, own in rows.items()}
