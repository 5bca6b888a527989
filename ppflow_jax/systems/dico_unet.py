"""The module of DiCo's network (arXiv 2505.11196), see `systems.dico_network`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ppflow_jax.devices.layout import Layout
from ppflow_jax.devices.programs import Programs
from ppflow_jax.flow.path import VP
from ppflow_jax.models.conditions import Cond, split
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import (
    Block,
    Execution,
    TimestepEmbedder,
    _normal,
    _xavier,
    _zeros,
    linear,
    modulate,
)
from ppflow_jax.models.patch import patchify, unpatchify
from ppflow_jax.models.stack import Output, Stack, unstacked

if TYPE_CHECKING:
    from ppflow_jax.systems.dico_network import DiCoNetwork


def moved(name: str, channels: int) -> int:
    """Channels that the convolution of a move makes of so many."""
    return channels // 2 if name.startswith("down") else 2 * channels


@dataclass(frozen=True)
class Level:
    """One of the five.

    Attributes:
      torch: its name in the original.
      widths: channels, over h.
      shrink: how many times fewer rows and columns than the first.
      told: which of the three embeddings it is told.
    """

    torch: str
    widths: int
    shrink: int
    told: int


LEVELS = {
    "encoder1": Level("encoder_level_1", 1, 1, 0),
    "encoder2": Level("encoder_level_2", 2, 2, 1),
    "latent": Level("latent", 4, 4, 2),
    "decoder2": Level("decoder_level_2", 2, 2, 1),
    "decoder1": Level("decoder_level_1", 2, 1, 1),
}
WIDTHS = (1, 2, 4)  # of the embeddings, over h
# Between levels: name here, name there, channels of the input over h, its rows shrunk by
MOVES = (
    ("down1", "down1_2.body.0", 1, 1),
    ("down2", "down2_3.body.0", 2, 2),
    ("up2", "up3_2.body.0", 4, 4),
    ("up1", "up2_1.body.0", 2, 2),
)
# Name here, name there, channels of input and output over h, rows shrunk by
JOINS = (("join2", "reduce_chan_level2", 4, 2, 2), ("join1", "reduce_chan_level1", 2, 2, 1))


def stack(level: str) -> str:
    """Name of the blocks of a level, whose leaves have an axis of depth."""
    return f"{level}_blocks"


def ddpm_step(t: Float[Array, " b"]) -> Float[Array, " b"]:
    """The step n in [0, 999] of DDPM at whose signal-to-noise ratio the path `vp` is at t.

    DDPM (arXiv 2006.11239) has 1000 variances from 1e-4 to 0.02; between its steps n is
    interpolated in the logarithm of the ratio.
    """
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    noise = jnp.asarray(np.log((1 - kept) / kept), jnp.float32)
    now = 2 * (jnp.log(VP.sigma(t)) - jnp.log(VP.alpha(t)))
    return jnp.interp(now, noise, jnp.arange(1000, dtype=jnp.float32))


class UNet(nnx.Module):
    """See `systems.dico_network`. Call it through `make_apply`."""

    def __init__(
        self,
        model: ModelConfig,
        settings: DiCoNetwork,
        *,
        dtype: DTypeLike,
        remat: str,
        rngs: nnx.Rngs,
        programs: Programs = Programs(),
        layout: Layout = Layout(),
        one_time: bool = False,
    ):
        run = Execution(dtype, programs, layout)
        self.config, self.settings, self.run, self.remat = model, settings, run, remat
        h, pyramid = model.width, model.pyramid
        pixels = [s.patch[0] * s.patch[1] * model.channels for s in pyramid.stages]

        def conv(inputs: int, outputs: int, dtype: DTypeLike = run.dtype, **options: Any):
            made = dict(kernel_size=(3, 3), padding="SAME", kernel_init=_xavier) | options
            return nnx.Conv(inputs, outputs, dtype=dtype, rngs=rngs, **made)

        def table(rows: int):
            embeds = (nnx.Embed(rows, w * h, embedding_init=_normal, rngs=rngs) for w in WIDTHS)
            return nnx.List(list(embeds))

        self.patchify = nnx.List([conv(c, h) for c in pixels])
        self.time = nnx.List([TimestepEmbedder(w * h, dtype=run.dtype, rngs=rngs) for w in WIDTHS])
        self.label = table(model.num_classes + 1)
        if model.has_levels:
            self.level = table(len(pyramid))
        for name in LEVELS:
            setattr(self, stack(name), _stacked(settings.level(model, name), run, rngs))
        for name, _, inputs, _ in MOVES:
            setattr(self, name, conv(inputs * h, moved(name, inputs * h), use_bias=False))
        for name, _, inputs, outputs, _ in JOINS:
            setattr(self, name, linear(inputs * h, outputs * h, rngs, dtype=run.dtype))
        self.final_adaln = linear(2 * h, 4 * h, rngs, dtype=run.dtype, init=_zeros)
        times = 1 + model.learn_sigma
        self.unpatchify = nnx.List(
            [conv(2 * h, times * c, jnp.float32, kernel_init=_zeros) for c in pixels]
        )

    def by_stage(
        self,
        xs: tuple[Float[Array, "_ h w c"], ...],
        ts: tuple[Float[Array, " _"], ...],
        ys: tuple[Cond, ...],
        stages: tuple[int, ...],
    ) -> tuple[Output, ...]:
        """Of several stages, in one pass over the blocks."""
        seen = tuple(map(ddpm_step, ts)) if self.settings.time == "ddpm" else ts
        outs, _ = self.outputs(xs, seen, ys, stages)
        return tuple(Output(out[..., : self.config.channels], {}) for out in outs)

    def outputs(self, xs, ts, ys, stages) -> tuple[tuple[Array, ...], dict[str, tuple]]:
        """All channels of the predictions, at times as the network is told them, and what every
        part of it gave, by name: grids [b, rows, columns, channels], float32."""
        labels = tuple(split((), y).labels for y in ys)
        cs = [self.embeddings(k, ts, labels, stages) for k in range(len(WIDTHS))]
        patches = [self.config.pyramid.stages[stage].patch for stage in stages]
        grids = [self.config.pyramid.grid(stage, self.config.latent_size) for stage in stages]
        hs = tuple(
            patchify(x, patch).reshape(len(x), *grid, -1)
            for x, patch, grid in zip(xs, patches, grids)
        )
        found = {"patchify": tuple(_wide(self.patchify[s](h)) for s, h in zip(stages, hs))}

        def through(name: str, hs: tuple[Array, ...]) -> tuple[Array, ...]:
            found[name] = self.level_of(name, hs, cs[LEVELS[name].told])
            return found[name]

        def moved(name: str, hs: tuple[Array, ...]) -> tuple[Array, ...]:
            found[name] = tuple(self.moved(name, h) for h in hs)
            return found[name]

        def joined(name: str, hs: tuple[Array, ...], skips: tuple[Array, ...]):
            both = (jnp.concatenate(pair, axis=-1) for pair in zip(hs, skips))
            found[name] = tuple(_wide(getattr(self, name)(h)) for h in both)
            return found[name]

        first = through("encoder1", found["patchify"])
        second = through("encoder2", moved("down1", first))
        hs = moved("up2", through("latent", moved("down2", second)))
        hs = moved("up1", through("decoder2", joined("join2", hs, second)))
        hs = through("decoder1", joined("join1", hs, first))
        finals = zip(hs, cs[1], stages, grids, patches)
        return tuple(self.final(*each) for each in finals), found

    def moved(self, name: str, h: Float[Array, "b r s c"]) -> Float[Array, "b u v d"]:
        """To the next grid: a convolution, and pixel-unshuffle or pixel-shuffle."""
        shape = "b r s (c i j) -> b (r i) (s j) c"
        if name.startswith("down"):
            shape = "b (r i) (s j) c -> b r s (c i j)"
        return einops.rearrange(_wide(getattr(self, name)(h)), shape, i=2, j=2)

    def embeddings(self, k: int, ts, labels, stages) -> tuple[Float[Array, "_ d"], ...]:
        """SiLU of the sum of the embeddings of width `WIDTHS[k]`, of every stage."""
        cs = [self.time[k](t).astype(jnp.float32) + self.label[k](y) for t, y in zip(ts, labels)]
        if self.config.has_levels:
            cs = [c + self.level[k](jnp.full(len(c), stage)) for c, stage in zip(cs, stages)]
        return tuple(self.run.layout.batch(jax.nn.silu(c)) for c in cs)

    def level_of(self, name: str, hs: tuple[Array, ...], cs: tuple[Array, ...]):
        """The blocks of one level, in one pass for all stages."""
        blocks, layers = getattr(self, stack(name)), ()
        if self.run.programs.unrolled:
            layers = unstacked({"blocks": nnx.to_pure_dict(nnx.state(blocks))})["blocks"]
        through = Stack(blocks, layers, self.run, self.remat)
        tokens = tuple(einops.rearrange(h, "b r s c -> b (r s) c") for h in hs)
        outs, *_ = through(tokens, cs, (None,) * len(hs), tuple(h.shape[1:3] for h in hs))
        return tuple(out.reshape(h.shape) for out, h in zip(outs, hs))

    def final(self, h, c, stage: int, grid, patch) -> Float[Array, "b h w o"]:
        """adaLN and the last convolution of a stage, in float32."""
        shift, scale = jnp.split(self.final_adaln(c).astype(jnp.float32), 2, axis=-1)
        tokens = modulate(einops.rearrange(h, "b r s c -> b (r s) c"), shift, scale)
        out = self.unpatchify[stage](tokens.reshape(h.shape))
        return unpatchify(einops.rearrange(out, "b r s o -> b (r s) o"), grid, patch)


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)


def _stacked(level: ModelConfig, run: Execution, rngs: nnx.Rngs) -> Block:
    """The blocks of a level, every leaf with an axis of depth."""
    make = nnx.vmap(lambda r: Block(level, run, rngs=r), in_axes=0, out_axes=0)
    return make(rngs.split(level.depth))


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)
