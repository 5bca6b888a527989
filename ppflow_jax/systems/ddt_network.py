"""The modules of DiT^DH and how they are called; what they compute says `systems.ddt`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ppflow_jax.devices.layout import Layout
from ppflow_jax.devices.programs import Programs
from ppflow_jax.models.conditions import Cond, Told, split
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import Execution, _normal, _zeros, linear
from ppflow_jax.models.network import Output, PPFlow, Trunk, apart, joined
from ppflow_jax.models.patch import patchify, unpatchify
from ppflow_jax.models.stack import Params, Stack, Taps, unstacked
from ppflow_jax.systems.ddt_blocks import NormedBlock, TokenBlock, modulated

if TYPE_CHECKING:
    from ppflow_jax.systems.ddt import DDT

FOURIER = 256  # frequencies of time


class FourierTime(nnx.Module):
    """[sin, cos](2 pi n w) of noise time n = 1 - t through a two-layer MLP."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.frequencies = nnx.Param(jax.random.normal(rngs.params(), (FOURIER,)))
        # In bfloat16 close times would be one
        self.fc1 = linear(2 * FOURIER, width, rngs, dtype=jnp.float32, init=_normal)
        self.fc2 = linear(width, width, rngs, dtype=dtype, init=_normal)

    def __call__(self, t: Float[Array, " b"]) -> Float[Array, "b d"]:
        w = jax.lax.stop_gradient(self.frequencies[...].astype(jnp.float32))
        angle = 2 * jnp.pi * (1 - t)[:, None] * w[None]
        features = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        return self.fc2(jax.nn.silu(self.fc1(features)))


class WideHead(PPFlow):
    """The network. Call it through `make_apply`."""

    def __init__(
        self,
        config: ModelConfig,
        settings: DDT,
        *,
        dtype: DTypeLike,
        remat: str,
        rngs: nnx.Rngs,
        programs: Programs = Programs(),
        layout: Layout = Layout(),
        one_time: bool = False,
    ):
        self.config, self.remat, self.layout = config, remat, layout
        self.one_time, self.run = one_time, Execution(dtype, programs, layout)
        encoder, head = settings.stacks(config)
        areas = [s.patch[0] * s.patch[1] for s in config.pyramid.stages]
        outputs = config.channels * (2 if config.learn_sigma else 1)

        def patches(width: int):
            return nnx.List([linear(a * config.channels, width, rngs, dtype=dtype) for a in areas])

        def blocks(kind: type[NormedBlock], stack: ModelConfig) -> NormedBlock:
            make = lambda r: kind(stack, self.run, rms=settings.rms, rngs=r)
            return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(stack.depth))

        self.patchify, self.head_patchify = patches(encoder.width), patches(head.width)
        self.time = FourierTime(encoder.width, dtype=dtype, rngs=rngs)
        rows = config.num_classes + 1
        self.label = nnx.Embed(rows, encoder.width, embedding_init=_normal, rngs=rngs)
        if config.has_levels:
            stages = len(config.pyramid)
            self.level = nnx.Embed(stages, encoder.width, embedding_init=_normal, rngs=rngs)
        self.blocks, self.head_blocks = blocks(NormedBlock, encoder), blocks(TokenBlock, head)
        self.wider = encoder.width != head.width
        if self.wider:
            self.project = linear(encoder.width, head.width, rngs, dtype=dtype)
        self.final_norm = nnx.Param(jnp.ones(head.width)) if settings.rms else None
        self.final_adaln = linear(head.width, 2 * head.width, rngs, dtype=dtype, init=_zeros)
        # The final projection stays in float32, as that of PPFlow.
        options: dict[str, Any] = dict(dtype=jnp.float32, init=_zeros)
        self.unpatchify = nnx.List(
            [linear(head.width, a * outputs, rngs, **options) for a in areas]
        )
        if config.conditions:
            self.conditions = nnx.Dict(
                {c.name: c.module(config, self.run, rngs) for c in config.conditions}
            )

    def embedded(
        self,
        ts: tuple[Float[Array, " _"], ...],
        told: tuple[Told, ...],
        stages: tuple[int, ...],
    ) -> tuple[tuple[Float[Array, "_ d"], ...], tuple[Float[Array, "_ d"], ...]]:
        """Of every stage the embedding of time (with that of the level), and c of the encoder.

        All stages in one batch, as in `PPFlow.embeddings`.
        """
        sizes = tuple(map(len, ts))
        turns = math.gcd(*sizes)
        t, y = joined(ts, turns), joined(tuple(each.labels for each in told), turns)
        times = apart(self.time(t.reshape(-1)).astype(jnp.float32), sizes, turns)
        labels = apart(self.label(y.reshape(-1)), sizes, turns)
        if self.config.has_levels:
            times = [c + self.level(jnp.full(len(c), k)) for c, k in zip(times, stages)]
        cs = (jax.nn.silu(time + label) for time, label in zip(times, labels))
        return tuple(map(self.layout.batch, times)), tuple(map(self.layout.batch, cs))

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        y: Cond,
        stage: int,
        trunk: Trunk | None = None,
    ) -> Float[Array, "b h w c"] | tuple[Float[Array, "b h w c"], Any]:
        if trunk is None:
            return self.by_stage((x,), (t,), (y,), (stage,))[0].prediction
        told = split(self.config.conditions, y)
        times, cs = self.embedded((t,), (told,), (stage,))
        blocks = self.blocks.given(None, self.grid(stage))
        h, extra = trunk(blocks, self.tokens(x, stage, told), jax.nn.silu(cs[0]))
        return self.head((h,), (x,), times, (stage,))[0], extra

    def by_stage(
        self,
        xs,
        ts,
        ys,
        stages: tuple[int, ...],
        layers: tuple[Params, ...] = (),
        taps: Taps = Taps(),
        drawn: tuple[()] = (),
    ) -> tuple[Output, ...]:
        """As of PPFlow; taps are of the encoder, whose blocks have no wrap to draw for."""
        told = tuple(split(self.config.conditions, y) for y in ys)
        times, cs = self.embedded(ts, told, stages)
        hs = tuple(self.tokens(*each) for each in zip(xs, stages, told))
        stack = Stack(self.blocks, layers, self.run, self.remat)
        grids = tuple(map(self.grid, stages))
        cs = tuple(map(jax.nn.silu, cs))  # once more, as every block of the original does
        hs, _, _, found = stack(hs, cs, (None,) * len(stages), grids, taps)
        outputs = zip(self.head(hs, xs, times, stages), found)
        return tuple(Output(prediction, {}, taken) for prediction, taken in outputs)

    def head(
        self,
        hs: tuple[Float[Array, "_ _ d"], ...],
        xs: tuple[Float[Array, "_ h w c"], ...],
        times: tuple[Float[Array, "_ d"], ...],
        stages: tuple[int, ...],
    ) -> tuple[Float[Array, "_ h w c"], ...]:
        """The prediction of every stage, from tokens that leave the encoder and the latents."""
        own = tuple(self.layout.batch(self.own(*each)) for each in zip(xs, stages))
        cs = tuple(map(self.told, hs, times))
        stack = Stack(self.head_blocks, self._layers(), self.run, self.remat)
        grids = tuple(map(self.grid, stages))
        own, *_ = stack(own, cs, (None,) * len(stages), grids)
        return tuple(map(self.outputs, own, cs, stages))

    def own(self, x: Float[Array, "b h w c"], stage: int) -> Float[Array, "b n d"]:
        """The head's tokens, which have no positions but those of its attention."""
        patch = self.config.pyramid.stages[stage].patch
        return self.head_patchify[stage](patchify(x, patch)).astype(jnp.float32)

    def told(self, h: Float[Array, "b n d"], time: Float[Array, "b d"]) -> Float[Array, "b n e"]:
        """SiLU(s) of every token."""
        s = jax.nn.silu(time[:, None] + h)
        if self.wider:
            s = self.project(s).astype(jnp.float32)
        return self.layout.batch(jax.nn.silu(s))

    def outputs(
        self, h: Float[Array, "b n d"], c: Float[Array, "b n d"], stage: int
    ) -> Float[Array, "b h w c"]:
        """What the head's tokens predict."""
        shift, scale = jnp.split(self.final_adaln(c).astype(jnp.float32), 2, axis=-1)
        norm = None if self.final_norm is None else self.final_norm[...]
        out = self.unpatchify[stage](modulated(h, norm, shift, scale))
        patch = self.config.pyramid.stages[stage].patch
        return unpatchify(out, self.grid(stage), patch)[..., : self.config.channels]

    def _layers(self) -> tuple[Params, ...]:
        """The head's blocks one by one, where blocks are."""
        if not self.run.programs.unrolled:
            return ()
        return unstacked({"blocks": nnx.to_pure_dict(nnx.state(self.head_blocks))})["blocks"]
