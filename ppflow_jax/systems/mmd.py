"""Fine-tuning of a sampler of few steps by the distance of its samples (MMD, arXiv 2301.07969).

Noise is sampled by `steps` Euler steps, with gradient through all of them, and the maximum mean
discrepancy between features of the samples and of the data is minimised: with a kernel k, for m
samples x and n pictures y,

    MMD^2 = sum_(i != j) k(x_i, x_j) / (m (m-1)) + sum_(i != j) k(y_i, y_j) / (n (n-1))
            - 2 mean k(x, y),

which is unbiased and may be negative. With k(x, y) = (x.y / d + 1)^3 on features of Inception it is
the kernel inception distance.

The paper takes features of Inception or CLIP, of decoded pictures. Here they are those of the
network itself before fine-tuning, the teacher: its tokens after some blocks at a time near data,
normed and averaged over places (what `ppflow probe` sees; it needs no labels, no decoder and no
other network). `MmdObjective.features` takes any other function, such as a classifier's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ppflow_jax.errors import InputError
from ppflow_jax.flow.guidance import Cfg
from ppflow_jax.flow.loss import FlowObjective, check_batch
from ppflow_jax.flow.path import interpolate, velocity_from
from ppflow_jax.flow.plan import SamplerConfig, Segment, plan
from ppflow_jax.flow.terms import Batch, Metrics, Weights, network_leaves
from ppflow_jax.models.conditions import Cond
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import layer_norm
from ppflow_jax.models.network import Apply, Params
from ppflow_jax.models.parts import Described
from ppflow_jax.models.stack import Taps
from ppflow_jax.systems.guided_distillation import TEACHER

KERNELS = ("poly", "rbf")
# (program and weights of the teacher, pictures, noise of as many) -> features
Features = Callable[[Apply, Params, Array, Array], Float[Array, "b d"]]


def kernel(
    kind: str, degree: int, x: Float[Array, "m d"], y: Float[Array, "n d"]
) -> Float[Array, "m n"]:
    """`poly`: (x.y / d + 1)^degree; `rbf`: exp(-|x - y|^2 / d)."""
    inner, d = jnp.einsum("id,jd->ij", x, y, precision="highest"), x.shape[1]
    if kind == "poly":
        return (inner / d + 1) ** degree
    squares = [jnp.sum(jnp.square(a), axis=1) for a in (x, y)]
    apart = squares[0][:, None] + squares[1][None] - 2 * inner
    return jnp.exp(-jnp.maximum(apart, 0) / d)


def mmd2(
    x: Float[Array, "m d"], y: Float[Array, "n d"], kind: str = "poly", degree: int = 3
) -> Float[Array, ""]:
    """The unbiased estimate, see above; m and n are at least 2."""
    k = partial(kernel, kind, degree)
    total = -2 * jnp.mean(k(x, y))
    for z in (x, y):
        own, n = k(z, z), len(z)
        total += jnp.sum(jnp.where(np.eye(n, dtype=bool), 0, own)) / (n * (n - 1))
    return total


class Draws(NamedTuple):
    """Everything random in one step; `blur` is the noise under which the teacher looks."""

    noise: Float[Array, "b h w c"]
    blur: Float[Array, "b h w c"]
    labels: Int[Array, " b"]


@dataclass(frozen=True)
class Mmd(Described):
    """Settings of the objective, as configurations have them.

    Attributes:
      steps: of Euler's method on the aligned grid.
      scale: of guidance at every step.
      kernel, degree: see `kernel`.
      block: after how many blocks the teacher's tokens are features; 0: two thirds of them.
      time: at which the teacher looks, near data.

    Raises:
      InputError: a value out of its range.
    """

    kind = "mmd"
    steps: int = 4
    scale: float = 1.0
    kernel: str = "poly"
    degree: int = 3
    block: int = 0
    time: float = 0.9

    def __post_init__(self):
        if self.kernel not in KERNELS:
            raise InputError(f"{self}: kernel is one of {', '.join(KERNELS)}")
        if self.steps < 1 or self.degree < 1 or self.block < 0:
            raise InputError(f"{self}: steps and degree must be at least 1, block at least 0")
        if not (0 < self.time <= 1 and np.isfinite(self.scale)):
            raise InputError(f"{self}: time must be in (0, 1], scale finite")

    def notes(self, config: SamplerConfig) -> tuple[str, ...]:
        """What a person should know of sampling so."""
        asked = config.solver, config.steps, config.grid, set(config.cfg)
        if asked == ("euler", self.steps, "aligned", {self.scale}):
            return ()
        return (
            f"the model was fine-tuned for solver=euler, steps={self.steps}, cfg={self.scale:g}: "
            "with others its samples are of another distribution",
        )

    def on(self, base: FlowObjective, model: ModelConfig) -> MmdObjective:
        """
        Raises:
          InputError: terms, tasks, conditions, a block that there is not, or fewer steps than
            stages.
        """
        if base.terms or base.conditions or model.conditions or model.block.term_names:
            raise InputError(
                "objective mmd is for plain models: leave config.flow.terms, config.data.task, "
                "config.model.conditions and blocks with terms of their own out"
            )
        if self.block > model.depth:
            raise InputError(f"{self}: the model has {model.depth} blocks")
        block = self.block or max(1, 2 * model.depth // 3)
        return MmdObjective(base, self, Looking(base, block, self.time))


@dataclass(frozen=True)
class Looking:
    """Features of the teacher."""

    base: FlowObjective
    block: int
    time: float

    def __call__(
        self,
        apply: Apply,
        teacher: Params,
        x: Float[Array, "b h w c"],
        noise: Float[Array, "b h w c"],
    ) -> Float[Array, "b d"]:
        """Tokens after the block, normed, their mean over places; without a class."""
        t = jnp.full(len(x), self.time)
        z, _ = interpolate(self.base.flow.interpolant, noise, x, t)
        y = jnp.full(len(x), self.base.null_label, jnp.int32)
        taps, stage = Taps(h=(self.block,)), self.base.pyramid.stage_at(np.float32(self.time))
        tokens = apply(teacher, z, t, y, stage, taps=taps).taps[f"h/{self.block}"]
        return jnp.mean(layer_norm(tokens), axis=1)


@dataclass(frozen=True)
class MmdObjective:
    """What is minimised.

    Attributes:
      base: path, stages and null class.
      features: of pictures, by `frozen["teacher"]` or something else.
    """

    base: FlowObjective
    settings: Mmd
    features: Features

    frozen = (TEACHER,)
    forward_mode = False

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The plan of the sampler."""
        config = SamplerConfig("euler", self.settings.steps, cfg=(self.settings.scale,))
        return plan(config, self.base.pyramid, self.base.flow)

    def each_step(self) -> Iterator[tuple[int, float, float, float]]:
        """Stage, guidance scale, start and end of every step."""
        for s in self.segments:
            for start, end in zip(s.times, s.times[1:]):
                yield s.stages[0], s.scales[0], start, end

    @property
    def pattern(self) -> tuple[int, ...]:
        """The first step's; `evaluated` has the others."""
        return self.segments[0].stages

    @property
    def evaluated(self) -> tuple[int, ...]:
        """Steps, which are computed again for the gradient and double under guidance; features."""
        passes: list[int] = []
        for stage, scale, *_ in self.each_step():
            passes += [stage] * (4 if scale == 1 else 8)
        look = self.base.pyramid.stage_at(np.float32(self.settings.time))
        return (*passes[3:], *[look] * 4)

    def check_batch(self, batch_size: int, shards: int) -> None:
        """See `FlowObjective.check_batch`."""
        if batch_size < 2:
            raise InputError(f"objective mmd compares pairs of a batch, which has {batch_size}")
        check_batch(self.pattern, batch_size, shards, "objective mmd")

    def init(self, model: ModelConfig, key: Key[Array, ""]) -> Params:
        return {}

    def fields(self, weights: Weights) -> tuple[str, ...]:
        return ()

    def draw(self, key: Key[Array, ""], batch: Batch) -> Draws:
        """Noises of one step; samples have the labels of the batch."""
        noise, blur = jax.random.normal(key, (2, *batch["x"].shape))
        return Draws(noise, blur, batch["label"])

    def samples(
        self, apply: Apply, params: Params, noise: Float[Array, "b h w c"], labels: Cond
    ) -> Float[Array, "b h w c"]:
        """By all steps; each is computed again where its gradient is."""
        cfg, flow = Cfg(self.base.null_label), self.base.flow

        def one(stage: int, scale: float, params: Params, x: Array, t: Array, length: Array):
            predict = lambda x, t, y: apply(params, x, t, y, stage)
            ts = jnp.full(len(x), t)
            if scale == 1:
                prediction = predict(x, ts, labels)
            else:
                prediction = cfg(predict, None, x, ts, labels, scale)
            return x + length * velocity_from(flow, prediction, x, ts)

        x = noise
        for stage, scale, start, end in self.each_step():
            step = jax.checkpoint(partial(one, stage, scale))
            x = step(params, x, jnp.float32(start), jnp.float32(end) - jnp.float32(start))
        return x

    def loss(
        self,
        apply: Apply,
        params: Params,
        frozen: Mapping[str, Any],
        batch: Batch,
        draws: Draws,
        weights: Weights,
    ) -> tuple[Float[Array, ""], Metrics]:
        """MMD^2 between the features of samples and of the batch, `loss`."""
        x = self.samples(apply, network_leaves(params), draws.noise, draws.labels)
        teacher = jax.lax.stop_gradient(frozen[TEACHER])
        ours, theirs = (self.features(apply, teacher, z, draws.blur) for z in (x, batch["x"]))
        loss = mmd2(ours, theirs, self.settings.kernel, self.settings.degree)
        return loss, {"loss": loss}
