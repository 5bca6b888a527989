"""The training objective: a batch stratified by stage, each stage at its own token count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import WEIGHTINGS, Flow, interpolate, residual
from ppflow_jax.models.network import Apply, Output, Params
from ppflow_jax.pyramid import Pyramid


@dataclass(frozen=True)
class Objective:
    """What is minimised.

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
    terms: tuple[tuple[str, float], ...] = ()

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
        if wrong := [f"{name} {weight}" for name, weight in self.terms if not weight >= 0]:
            raise InputError(f"weights of terms must be at least 0, got {', '.join(wrong)}")
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
    def pattern(self) -> tuple[int, ...]:
        """Stage of sample i is `pattern[i % len(pattern)]`."""
        counts = self.stage_share or self.pyramid.shares()
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
        unit = len(self.pattern) * shards
        if batch_size < 1 or batch_size % unit:
            below = max(unit, batch_size // unit * unit)
            raise InputError(
                f"batch of {batch_size} cannot be divided among {shards} data shard(s) with "
                f"stage shares {':'.join(map(str, self.stage_share or self.pyramid.shares()))}: "
                f"choose a multiple of {unit}, e.g. {below}"
            )


class Draws(NamedTuple):
    """Everything random in one step."""

    noise: Float[Array, "b h w c"]
    t: Float[Array, " b"]
    labels: Int[Array, " b"]


def strided(x: Array, pattern: tuple[int, ...], stage: int) -> Array:
    """Samples of one stage, in order: a slice of every pattern, so no shard talks to another."""
    where = np.flatnonzero(np.asarray(pattern) == stage)
    first, count = int(where[0]), len(where)
    rows = x.reshape(x.shape[0] // len(pattern), len(pattern), *x.shape[1:])
    return rows[:, first : first + count].reshape(-1, *x.shape[1:])


def draw(
    objective: Objective,
    key: Key[Array, ""],
    x1: Float[Array, "b h w c"],
    labels: Int[Array, " b"],
) -> Draws:
    """Noise, stratified times and dropped labels of one step."""
    k_noise, k_time, k_drop = jax.random.split(key, 3)
    batch = x1.shape[0]
    lo, hi = np.asarray(objective.time_ranges, np.float32)[list(objective.pattern)].T
    repeats = batch // len(objective.pattern)
    u = jax.random.uniform(k_time, (batch,))
    t = jnp.tile(lo, repeats) + jnp.tile(hi - lo, repeats) * u
    dropped = jax.random.uniform(k_drop, (batch,)) < objective.label_drop
    return Draws(
        noise=jax.random.normal(k_noise, x1.shape),
        t=t,
        labels=jnp.where(dropped, objective.null_label, labels),
    )


def stage_losses(
    objective: Objective,
    apply: Apply,
    params: Params,
    x1: Float[Array, "b h w c"],
    draws: Draws,
) -> tuple[Float[Array, " n"], ...]:
    """Loss of every sample, by stage: mean squared residual over a sample's elements."""
    return _stages(objective, apply, params, x1, draws)[0]


def _stages(objective, apply, params, x1, draws) -> tuple[tuple[Array, ...], tuple[Output, ...]]:
    """Loss of every sample and output of the network, by stage."""
    stages = tuple(range(len(objective.pyramid)))
    parts = [[strided(a, objective.pattern, i) for i in stages] for a in (x1, *draws)]
    data, noise, t, y = (tuple(part) for part in parts)
    path = objective.flow.interpolant
    xt, velocity = zip(*(interpolate(path, *each) for each in zip(noise, data, t)))
    outputs = apply(params, xt, t, y, stages)
    losses = []
    for u, v, output, s in zip(noise, velocity, outputs, t):
        error = residual(objective.flow, objective.weighting, u, v, output.prediction, s)
        losses.append(jnp.mean(jnp.square(error), axis=(1, 2, 3)))
    return tuple(losses), outputs


def loss_fn(
    objective: Objective,
    apply: Apply,
    params: Params,
    x1: Float[Array, "b h w c"],
    draws: Draws,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """What is minimised; besides, `loss`, `loss/stage{i}` and the terms by name, without weights.

    `loss` is the mean over time, in which each stage counts by its duration. That equals the mean
    over the batch when the batch is shared by duration. Terms, which are added to it with their
    weights, are over stages what it is.
    """
    losses, outputs = _stages(objective, apply, params, x1, draws)
    durations = [b - a for a, b in objective.pyramid.intervals]
    means = [jnp.mean(x) for x in losses]
    loss = sum(d * m for d, m in zip(durations, means))
    metrics = {f"loss/stage{i}": m for i, m in enumerate(means)} if len(means) > 1 else {}
    total = loss
    for name, weight in objective.terms:
        term = sum(d * output.aux[name] for d, output in zip(durations, outputs))
        total, metrics[name] = total + weight * term, term
    return total, metrics | {"loss": loss}
