"""How DyDiT is trained: what it computes is brought down to a share of the complete model's FLOPs.

    loss = flow(dynamic) + flow(complete) + 2 (F - target)^2

The routers decide with noise for the first term, for the second everything is on. F is the share
of the blocks' FLOPs that is computed, the mean over images. With several stages each counts by its
duration times its cost, so that it is the share of what sampling costs. The target is 1 for 100
steps, then it is on the line from 1 at step 0 to `share` at step `warmup`.

Each quarter of a stage's times has the same number of samples: those of a stage take turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt

from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import Draws, FlowObjective, OnFlow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.strata import check_batch, over_time, strided
from ppflow_jax.flow.terms import Batch, Metrics, Weights
from ppflow_jax.models.conditions import Cond
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.leaves import Described
from ppflow_jax.models.network import Apply, Params
from ppflow_jax.systems.dydit import DyDiT, Noise

HELD = 100  # steps with a target of 1
QUARTERS = 4
COMPLETE = "complete"


def flops_target(step: Int[Array, ""] | int, share: float, warmup: int) -> Float[Array, ""]:
    """What F is to be in a step, float32."""
    line = 1 - (1 - share) * jnp.minimum(step / warmup, 1)
    return jnp.where(step < HELD, 1.0, line).astype(jnp.float32)


def flops_loss(spent: Float[Array, ""], target: Float[Array, ""] | float) -> Float[Array, ""]:
    """2 (F - target)^2."""
    return 2 * jnp.square(spent - target)


class Dynamic(NamedTuple):
    """Everything random in a step, and its target.

    Attributes:
      seeds: of the noise of every image.
      target: the same for all.
    """

    noise: Float[Array, "b h w c"]
    t: Float[Array, " b"]
    labels: Cond
    seeds: UInt[Array, " b"]
    target: Float[Array, " b"]


@dataclass(frozen=True)
class FlopsTarget(Described):
    """Settings.

    Attributes:
      share: of the complete model's FLOPs, at the end.
      warmup: steps until it is to be reached.

    Raises:
      InputError: a value out of its range.
    """

    kind = "dydit"
    share: float = 0.5
    warmup: int = 1000

    def __post_init__(self):
        if not 0 < self.share <= 1 or self.warmup < 1:
            raise InputError(f"{self}: share must be in (0, 1], warmup at least 1")

    def on(self, base: FlowObjective, model: ModelConfig) -> DynamicFlow:
        """
        Raises:
          InputError: blocks without routers, or terms.
        """
        if not isinstance(model.block.wrap, DyDiT):
            raise InputError(
                f"objective {self.kind} trains routers, and config.model.wrap is "
                f"{model.block.wrap or 'none'}: set it to {DyDiT.kind}"
            )
        if base.terms:
            raise InputError(f"objective {self.kind} has no terms: leave config.flow.terms out")
        return DynamicFlow(base, self, model)

    def notes(self, config: SamplerConfig) -> tuple[str, ...]:
        """Nothing: it is sampled as any model."""
        return ()


@dataclass(frozen=True)
class DynamicFlow(OnFlow):
    """A model that learns what it need not compute.

    Attributes:
      base: the flow's own loss.
      settings: the target.
      model: whose blocks have routers.
    """

    base: FlowObjective
    settings: FlopsTarget
    model: ModelConfig

    @property
    def evaluated(self) -> tuple[int, ...]:
        """The complete model, and its gradient."""
        return self.pattern * 3

    @property
    def weights(self) -> tuple[float, ...]:
        """How much each stage counts in F."""
        model, block = self.model, self.model.block
        costs = []
        for stage, duration in enumerate(self.base.durations):
            rows, cols = model.pyramid.grid(stage, model.latent_size)
            n = rows * cols
            costs.append(
                duration * (block.mixer.flops(model, stage, n) + block.ffn.flops(model, n))
            )
        return tuple(cost / sum(costs) for cost in costs)

    def check_batch(self, batch_size: int, shards: int) -> None:
        self.base.check_batch(batch_size, shards)
        unit = self.pattern * QUARTERS
        check_batch(unit, batch_size, 1, "quarters of every stage's times")

    def draw(self, key: Key[Array, ""], batch: Batch) -> Dynamic:
        """Noise, times of all quarters, dropped labels and seeds; the target is that of `at`."""
        drawn = self.base.draw(key, batch)
        size = len(drawn.t)
        k_time, k_seeds = jax.random.split(jax.random.fold_in(key, 1))
        quarter = np.arange(size) // len(self.pattern) % QUARTERS
        u = (quarter.astype(np.float32) + jax.random.uniform(k_time, (size,))) / QUARTERS
        # u < 1 also where the sum was rounded up
        u = jnp.minimum(u, np.nextafter(np.float32(1), np.float32(0)))
        seeds = jax.random.bits(k_seeds, (size,), jnp.uint32)
        return Dynamic(drawn.noise, self.base.times(u), drawn.labels, seeds, jnp.ones(size))

    def at(self, draws: Dynamic, step: Int[Array, ""]) -> Dynamic:
        """The draws of a step, with its target."""
        target = flops_target(step, self.settings.share, self.settings.warmup)
        return draws._replace(target=jnp.full_like(draws.target, target))

    def loss(
        self,
        apply: Apply,
        params: Params,
        frozen: Mapping[str, Any],
        batch: Batch,
        draws: Dynamic,
        weights: Weights,
    ) -> tuple[Float[Array, ""], Metrics]:
        """What is minimised, and as metrics `loss` (the flow's of the dynamic model), `complete`
        (that of the complete one, if it has a weight), `spent` (F), `target`, and F by stage."""
        base, stages = self.base, range(len(self.base.pyramid))
        complete = weights.get(COMPLETE, 0.0)
        seeds = (strided(draws.seeds, self.pattern, stage) for stage in stages)
        noise = tuple(Noise.drawn(own, self.model, stage) for stage, own in enumerate(seeds))
        if complete:
            noise += tuple(map(Noise.complete, noise))

        def both(params, xt, t, y, stages):
            times = len(noise) // len(stages)
            rows = (each * times for each in (xt, t, y, stages))
            return apply(params, *rows, **{DyDiT.kind: noise})

        given = Draws(*draws[:3])
        views, outputs = base.predicted(both, params, frozen, batch, given)
        dynamic, whole = outputs[: len(stages)], outputs[len(stages) :]
        losses = [base.errors(view, out) for view, out in zip(views, dynamic)]
        total, metrics = over_time(base.pyramid, losses, dynamic, {}, base.durations)
        if complete:
            losses = [base.errors(view, out) for view, out in zip(views, whole)]
            metrics[COMPLETE], _ = over_time(base.pyramid, losses, whole, {}, base.durations)
            total = total + complete * metrics[COMPLETE]
        shares = [out.aux["spent"] for out in dynamic]
        if len(shares) > 1:
            metrics |= {f"spent/stage{i}": share for i, share in enumerate(shares)}
        metrics["spent"] = sum(w * share for w, share in zip(self.weights, shares))
        metrics["target"] = jnp.max(draws.target)  # all are equal
        return total + flops_loss(metrics["spent"], metrics["target"]), metrics
