"""The training objective: a batch stratified by stage, each stage at its own token count."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import WEIGHTINGS, Flow, interpolate, residual
from ppflow_jax.flow.strata import check_batch, over_time, strided
from ppflow_jax.flow.terms import (
    OWN,
    Batch,
    Metrics,
    Term,
    View,
    Weights,
    network_leaves,
    own_leaves,
)
from ppflow_jax.flow.times import Law, LogitNormal, shares
from ppflow_jax.models.conditions import LABEL, Cond, Condition
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Apply, Output, Params
from ppflow_jax.models.stack import Taps
from ppflow_jax.pyramid import Pyramid


class Draws(NamedTuple):
    """Everything random in one step, and with the labels what else the network is told."""

    noise: Float[Array, "b h w c"]
    t: Float[Array, " b"]
    labels: Cond


@dataclass(frozen=True)
class FlowObjective:
    """Flow matching, and terms beside it.

    Attributes:
      pyramid, flow: stages; path and prediction.
      weighting: SiT loss weighting `none`, `velocity` or `likelihood` (score and noise only).
      label_drop: probability of replacing the label by the null class.
      null_label: label of the null class.
      stage_share: samples of each stage out of every `sum(stage_share)` consecutive ones.
        Empty: the stages' durations. Other shares spend the compute differently but estimate
        the same objective, since a stage always weighs its duration.
      stage_times: times (low, high) on which each stage is trained. Empty: its own interval, the
        only times at which the sampler uses it. ((0, 1), (0, 1)) trains every patch size on all
        times (FlexiDiT, arXiv 2502.20126).
      terms: what else may be minimised, besides what the parts of the blocks give.
      conditions: of the network; a batch has their values as fields.
      logit_normal: how raw times are distributed; None: uniformly. The flow's shift moves them.

    Raises:
      InputError: unknown weighting, weighting of a velocity, shares or times that do not fit the
        stages.
    """

    pyramid: Pyramid
    flow: Flow
    null_label: int
    weighting: str = "none"
    label_drop: float = 0.1
    stage_share: tuple[int, ...] = ()
    stage_times: tuple[tuple[float, float], ...] = ()
    terms: tuple[Term, ...] = ()
    conditions: tuple[Condition, ...] = ()
    logit_normal: LogitNormal | None = None

    frozen = ()
    forward_mode = False
    evaluated = ()

    def __post_init__(self):
        if self.weighting not in WEIGHTINGS:
            raise InputError(
                f"unknown weighting {self.weighting!r}: one of {', '.join(WEIGHTINGS)}"
            )
        if self.weighting != "none" and self.flow.prediction == "velocity":
            raise InputError(
                f"weighting {self.weighting!r} is for score and noise prediction; "
                "velocity prediction takes 'none'"
            )
        if not 0 <= self.label_drop <= 1:
            raise InputError(f"label_drop must be in [0, 1], got {self.label_drop}")
        share = self.stage_share
        if share and (len(share) != len(self.pyramid) or min(share) < 1):
            raise InputError(
                f"stage_share {share} must have one whole number >= 1 for each of the "
                f"{len(self.pyramid)} stages"
            )
        times = self.stage_times
        good = all(len(pair) == 2 and 0 <= pair[0] < pair[1] <= 1 for pair in times)
        if times and (len(times) != len(self.pyramid) or not good):
            raise InputError(
                f"stage_times {times} must have two times 0 <= low < high <= 1 for each of the "
                f"{len(self.pyramid)} stages"
            )

    @property
    def law(self) -> Law:
        """How times are distributed."""
        return Law(self.flow.shift, self.logit_normal)

    @property
    def durations(self) -> tuple[float, ...]:
        """How much each stage counts: by the probability of its times."""
        law = self.law
        return self.pyramid.durations if law.plain else law.masses(self.pyramid.intervals)

    @property
    def shares(self) -> tuple[int, ...]:
        """Samples of each stage out of every pattern."""
        by_time = self.pyramid.shares() if self.law.plain else shares(self.durations)
        return self.stage_share or by_time

    @property
    def pattern(self) -> tuple[int, ...]:
        """Stage of sample i is `pattern[i % len(pattern)]`."""
        counts = self.shares
        return tuple(stage for stage, count in enumerate(counts) for _ in range(count))

    @property
    def time_ranges(self) -> tuple[tuple[float, float], ...]:
        """Times drawn for each stage: its interval, or `stage_times`, without the path's singular
        ends."""
        lo, hi = self.flow.train_interval()
        times = self.stage_times or self.pyramid.intervals
        return tuple((max(a, lo), min(b, hi)) for a, b in times)

    def check_batch(self, batch_size: int, shards: int) -> None:
        """Every one of `shards` equal parts of the batch must hold whole stage patterns.

        Raises:
          InputError: it does not.
        """
        text = ":".join(map(str, self.shares))
        check_batch(self.pattern, batch_size, shards, f"stage shares {text}")

    def init(self, model: ModelConfig, key: Key[Array, ""]) -> Params:
        """The leaves of the terms."""
        return own_leaves(self.terms, model, key)

    def fields(self, weights: Weights) -> tuple[str, ...]:
        """What the network is told, and what the terms with a weight need."""
        needed = (name for term in self.terms if weights.get(term.name) for name in term.fields)
        return tuple(dict.fromkeys([*(c.name for c in self.conditions), *needed]))

    def draw(self, key: Key[Array, ""], batch: Batch) -> Draws:
        """Noise, stratified times and dropped labels of one step.

        One number of an image decides on all that may be dropped: the label below `label_drop`,
        a condition below its own probability. So what is dropped less is dropped with the rest.
        """
        x1, labels = batch["x"], batch["label"]
        k_noise, k_time, k_drop = jax.random.split(key, 3)
        size = x1.shape[0]
        t = self.times(jax.random.uniform(k_time, (size,)))
        drop = jax.random.uniform(k_drop, (size,))
        dropped = drop < self.label_drop
        return Draws(
            noise=jax.random.normal(k_noise, x1.shape),
            t=t,
            labels=self.told(jnp.where(dropped, self.null_label, labels), drop, batch),
        )

    def times(self, u: Float[Array, " b"]) -> Float[Array, " b"]:
        """Times of a batch in each stage's range, from numbers uniform in [0, 1)."""
        lo, hi = np.asarray(self.time_ranges, np.float32)[list(self.pattern)].T
        repeats = len(u) // len(self.pattern)
        if not self.law.plain:
            return self.law.times(u, np.tile(lo, repeats), np.tile(hi, repeats))
        return jnp.tile(lo, repeats) + jnp.tile(hi - lo, repeats) * u

    def told(self, labels: Int[Array, " b"], drop: Float[Array, " b"], batch: Batch) -> Cond:
        """Labels, or these and the values of conditions; `drop` decides on what is dropped."""
        if not self.conditions:
            return labels
        values = {}
        for c in self.conditions:
            value = values[c.name] = batch[c.name]
            if c.dropped:
                rows = jnp.expand_dims(drop < c.dropped, range(1, value.ndim))
                values[c.name] = jnp.where(rows, c.null(value), value)
        return {LABEL: labels} | values

    def loss(
        self,
        apply: Apply,
        params: Params,
        frozen: Mapping[str, Any],
        batch: Batch,
        draws: Draws,
        weights: Weights,
    ) -> tuple[Float[Array, ""], Metrics]:
        """What is minimised; besides, `loss`, `loss/stage{i}` and the terms, without weights.

        `loss` is the mean over time, in which each stage counts by its duration. That equals the
        mean over the batch when the batch is shared by duration. Terms, which are added to it with
        their weights, are over stages what it is.
        """
        terms = [term for term in self.terms if weights.get(term.name)]
        taps = functools.reduce(operator.or_, (term.taps for term in terms), Taps())
        views, outputs = self.predicted(apply, params, frozen, batch, draws, taps)
        losses = [self.errors(view, output) for view, output in zip(views, outputs)]
        total, metrics = over_time(self.pyramid, losses, outputs, weights, self.durations)
        own = params.get(OWN, {})
        for term in terms:
            leaves = own.get(term.name, {})
            given = (jnp.mean(term(leaves, out, view)) for out, view in zip(outputs, views))
            value = sum(d * v for d, v in zip(self.durations, given))
            total, metrics[term.name] = total + weights[term.name] * value, value
        return total, metrics

    def predicted(
        self,
        apply: Apply,
        params: Params,
        frozen: Mapping[str, Any],
        batch: Batch,
        draws: Draws,
        taps: Taps = Taps(),
    ) -> tuple[list[View], tuple[Output, ...]]:
        """What the network sees and gives, by stage; arguments as of `loss`."""
        stages = tuple(range(len(self.pyramid)))
        x1 = batch["x"]

        def cut(told: Any) -> tuple[Any, ...]:
            return tuple(
                jax.tree.map(lambda a, i=i: strided(a, self.pattern, i), told) for i in stages
            )

        data, noise, t, y = map(cut, (x1, *draws))
        path = self.flow.interpolant
        xt, velocity = zip(*(interpolate(path, *each) for each in zip(noise, data, t)))
        tapped = {"taps": taps} if taps else {}
        outputs = apply(network_leaves(params), xt, t, y, stages, **tapped)
        further = {name: value for name, value in batch.items() if name not in ("x", "label")}
        views = [
            View(
                *(data[i], noise[i], xt[i], t[i], y[i], velocity[i]),
                batch={name: strided(value, self.pattern, i) for name, value in further.items()},
                frozen=frozen,
                stage=i,
                grid=self.pyramid.grid(i, x1.shape[1]),
                error=functools.partial(
                    *(residual, self.flow, self.weighting, noise[i], velocity[i]), t=t[i]
                ),
            )
            for i in stages
        ]
        return views, outputs

    def errors(self, view: View, output: Output) -> Float[Array, " b"]:
        """Mean squared residual over a sample's elements."""
        return jnp.mean(jnp.square(view.error(output.prediction)), axis=(1, 2, 3))


class OnFlow:
    """Base of objectives with a loss of their own on the batches and draws of a flow's, `base`."""

    base: FlowObjective
    frozen: tuple[str, ...] = ()
    forward_mode = False

    @property
    def pattern(self) -> tuple[int, ...]:
        return self.base.pattern

    @property
    def evaluated(self) -> tuple[int, ...]:
        return ()

    def check_batch(self, batch_size: int, shards: int) -> None:
        self.base.check_batch(batch_size, shards)

    def init(self, model: ModelConfig, key: Key[Array, ""]) -> Params:
        return {}

    def fields(self, weights: Weights) -> tuple[str, ...]:
        return self.base.fields(weights)

    def draw(self, key: Key[Array, ""], batch: Batch) -> Any:
        return self.base.draw(key, batch)
