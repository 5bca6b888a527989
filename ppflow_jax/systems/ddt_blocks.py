"""Blocks of DiT^DH (RAE, arXiv 2510.11690): 2-D rotary positions, SwiGLU and RMSNorm.

Queries and keys are turned by the place of their token (RoPE, arXiv 2104.09864). The first half of
a head of width e turns with the row, the second with the column, neighbouring features as a pair:

    (a, b) -> (a cos w - b sin w, b cos w + a sin w),   w = place x 10000^(-4k/e), k < e/4.

Places are those of `models.patch.positions`: the first latent pixel of a token, in units of the
pyramid's smallest patch, so that all stages agree on distances. SwiGLU (arXiv 2002.05202) is
W_3 (silu(W_1 x) * W_2 x). Both are parts for any model, the norm belongs to the network `ddt`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError
from ppflow_jax.models.attention import attend
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import (
    Attention,
    Block,
    Execution,
    _xavier,
    adapted,
    layer_norm,
    linear,
)
from ppflow_jax.models.leaves import Aux, Key, Site, linear_keys
from ppflow_jax.models.parts import Ffn, FullAttention, Mixer

EPSILON = 1e-6
NORMS = ("none", "rms", "layer")
_LAYER_EPSILON = 1e-5  # of queries and keys
_SIDES = ("q_norm", "k_norm")


def rms_norm(x: Float[Array, "... d"], scale: Float[Array, " d"]) -> Float[Array, "... d"]:
    """x / sqrt(mean(x^2) + 1e-6) times a learned scale, in float32 (arXiv 1910.07467)."""
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON)
    return x * jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))


def angles(
    grid: tuple[int, int], fine: tuple[int, int], width: int
) -> Float[np.ndarray, "n pairs"]:
    """w of every token and pair of a head, float64; `fine` is the grid of the smallest patch."""
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    places = (np.arange(n) * (whole / n) for n, whole in zip(grid, fine))
    row, col = np.meshgrid(*places, indexing="ij")
    return np.concatenate([np.outer(row, frequencies), np.outer(col, frequencies)], axis=1)


def turned(x: Float[Array, "b n h e"], w: Float[np.ndarray, "n pairs"]) -> Float[Array, "b n h e"]:
    """Neighbouring features as pairs, each turned by its angle; in float32, in the dtype of x."""
    cos, sin = (jnp.float32(f(w))[None, :, None] for f in (np.cos, np.sin))
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return out.reshape(x.shape).astype(x.dtype)


@dataclass(frozen=True)
class RopeAttention(Mixer):
    """Full attention with rotary positions.

    Attributes:
      qk_norm: of every head's queries and keys before they are turned: `none`, `rms` (RMSNorm) or
        `layer` (LayerNorm with scale and shift, epsilon 1e-5).

    Raises:
      InputError: an unknown norm; in `check`, heads whose width 4 does not divide.
    """

    qk_norm: str = "none"

    kind = "rope"

    def __post_init__(self):
        if self.qk_norm not in NORMS:
            raise InputError(f"{self}: qk_norm must be one of {', '.join(NORMS)}")

    def check(self, model: ModelConfig) -> None:
        if model.head_width % 4:
            raise InputError(
                f"{self}: heads are {model.head_width} wide ({model.width} by {model.heads}), and "
                "rows and columns take pairs of features: choose heads with a multiple of 4"
            )

    def modules(self, model: ModelConfig, run: Execution, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        grids = [model.pyramid.grid(k, model.latent_size) for k in range(len(model.pyramid))]
        fine = max(rows for rows, _ in grids), max(cols for _, cols in grids)
        return {"attention": RotaryAttention(model, run, rngs, fine, self.qk_norm)}

    def __call__(self, block: Block, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return block.attention.on_grid(x, block.grid)

    def flops(self, model: ModelConfig, stage: int, tokens: int) -> int:
        """8 N D^2 + 4 N^2 D."""
        return FullAttention().flops(model, stage, tokens)

    def scores(self, model: ModelConfig, stage: int) -> int:
        return FullAttention().scores(model, stage)

    def keys(self, layer: int) -> Iterator[Key]:
        leaves = {"none": {}, "rms": {"scale": "weight"}, "layer": _AFFINE}[self.qk_norm]
        for side in _SIDES:
            for leaf, torch in leaves.items():
                path = ("blocks", "attention", side, leaf)
                yield Key(f"blocks.{layer}.attn.{side}.{torch}", path, (layer,))

    @classmethod
    def read(cls, state: Any) -> RopeAttention | None:
        """That of a DiT^DH: no other names tell that positions are rotary."""
        if "s_embedder.proj.weight" not in state:
            return None
        if "blocks.0.attn.q_norm.weight" not in state:
            return cls()
        return cls("layer" if "blocks.0.attn.q_norm.bias" in state else "rms")


_AFFINE = {"scale": "weight", "shift": "bias"}


class RotaryAttention(Attention):
    """The projections of attention, and its norms."""

    def __init__(
        self, model: ModelConfig, run: Execution, rngs: nnx.Rngs, fine: tuple[int, int], norm: str
    ):
        options: dict[str, Any] = dict(programs=run.programs, per_device=run.layout.heads)
        super().__init__(model.width, model.heads, dtype=run.dtype, rngs=rngs, **options)
        self.fine, self.norm = fine, norm
        for side in _SIDES if norm != "none" else ():
            leaves = {"scale": nnx.Param(jnp.ones(model.head_width))}
            if norm == "layer":
                leaves["shift"] = nnx.Param(jnp.zeros(model.head_width))
            setattr(self, side, nnx.Dict(leaves))

    def on_grid(self, x: Float[Array, "b n d"], grid: tuple[int, int]) -> Float[Array, "b n d"]:
        """Attention of tokens row by row of `grid`."""
        q, k, v = self.project(x)
        w = angles(grid, self.fine, q.shape[-1])
        q, k = (turned(self.normed(a, side), w) for a, side in zip((q, k), _SIDES))
        out = attend(self.programs.attention, q, k, v, None, self.per_device)
        return self.per_token(self.out, out.reshape(x.shape))

    def normed(self, x: Float[Array, "b n h e"], side: str) -> Float[Array, "b n h e"]:
        if self.norm == "none":
            return x
        leaves, dtype = getattr(self, side), x.dtype
        if self.norm == "rms":
            return rms_norm(x, leaves["scale"][...]).astype(dtype)
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + _LAYER_EPSILON)
        scale, shift = (leaves[n][...].astype(jnp.float32)[None, None, None] for n in _AFFINE)
        return (x * scale + shift).astype(dtype)


@dataclass(frozen=True)
class SwiGlu(Ffn):
    """Gated MLP of int(2/3 int(r D)) hidden units, so that it costs what an MLP of r D does."""

    kind = "swiglu"
    rules = (
        (r"blocks/swiglu/kernel$", P(None, None, None, ("tensor", "fsdp"))),
        (r"blocks/swiglu/kernel$", P(None, "fsdp", None, "tensor")),
        (r"blocks/swiglu/bias$", P(None, None, "tensor")),
        (r"blocks/swiglu/out/kernel$", P(None, ("tensor", "fsdp"))),
        (r"blocks/swiglu/out/kernel$", P(None, "tensor", "fsdp")),
    )
    matrices = (
        (r"blocks/swiglu/kernel$", (1,), (3,)),
        (r"blocks/swiglu/out/kernel$", (1,), (2,)),
    )

    def units(self, model: ModelConfig) -> int:
        """Hidden units."""
        return int(2 / 3 * int(model.mlp_ratio * model.width))

    def modules(self, model: ModelConfig, run: Execution, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        return {self.kind: Gated(model.width, self.units(model), run, rngs)}

    def __call__(self, block: Block, x: Float[Array, "b n d"]) -> tuple[Float[Array, "b n d"], Aux]:
        return block.per_token(block.swiglu, x), {}

    def flops(self, model: ModelConfig, tokens: int) -> int:
        """6 N D u."""
        return 6 * tokens * model.width * self.units(model)

    def hidden(self, model: ModelConfig) -> float:
        """1.5 u: two products write as many, and one reads them, where an MLP has one and one."""
        return 1.5 * self.units(model)

    def keys(self, layer: int) -> Iterator[Key]:
        name, path = f"blocks.{layer}.mlp", ("blocks", self.kind)
        yield Key(
            f"{name}.w12.weight",
            (*path, "kernel"),
            (layer,),
            lambda x: einops.rearrange(x, "(c u) d -> d c u", c=2),
            lambda x: einops.rearrange(x, "d c u -> (c u) d"),
        )
        cut = lambda x: x.reshape(2, -1)
        yield Key(f"{name}.w12.bias", (*path, "bias"), (layer,), cut, np.ravel)
        yield from linear_keys(f"{name}.w3", *path, "out", index=(layer,))

    def sites(self, model: ModelConfig) -> Iterator[Site]:
        path, units = ("blocks", self.kind), self.units(model)
        yield Site("blocks/swiglu", path, model.width, (2, units), "mlp")
        yield Site("blocks/swiglu/out", (*path, "out"), units, (model.width,), "mlp")

    @classmethod
    def read(cls, state: Any, width: int) -> tuple[SwiGlu, int] | None:
        """The second is r D: 4 D if that has as many units, else the least that has."""
        name = "blocks.0.mlp.w12.weight"
        if name not in state:
            return None
        units = state[name].shape[0] // 2
        least = next(n for n in range(units, 2 * units + 2) if int(2 / 3 * n) == units)
        return cls(), 4 * width if int(2 / 3 * (4 * width)) == units else least


class Gated(nnx.Module):
    """The leaves of one block; the kernel is kept as [width, 2, units], so that a mesh can split
    the units."""

    def __init__(self, width: int, units: int, run: Execution, rngs: nnx.Rngs):
        self.dtype = run.dtype
        drawn = _xavier(rngs.params(), (width, 2 * units), jnp.float32)
        self.kernel = nnx.Param(drawn.reshape(width, 2, units))
        self.bias = nnx.Param(jnp.zeros((2, units)))
        self.out = linear(units, width, rngs, dtype=run.dtype)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        kernel, bias = (p[...].astype(self.dtype) for p in (self.kernel, self.bias))
        y = jnp.einsum("...d,dcu->...cu", x.astype(self.dtype), kernel)
        y = adapted(self, x, y + jnp.expand_dims(bias, range(y.ndim - 2)))
        return self.out(jax.nn.silu(y[..., 0, :]) * y[..., 1, :])


class NormedBlock(Block):
    """A block of DiT with learned RMSNorm, or its LayerNorm; modulated by image or by token."""

    def __init__(self, model: ModelConfig, run: Execution, *, rms: bool, rngs: nnx.Rngs):
        super().__init__(model, run, rngs=rngs)
        self.rms = rms
        if rms:
            self.norm1, self.norm2 = (nnx.Param(jnp.ones(model.width)) for _ in range(2))

    def modulated(self, branch: int, x: Array, shift: Array, scale: Array) -> Float[Array, "b n d"]:
        norm = (self.norm1, self.norm2)[branch][...] if self.rms else None
        return modulated(x, norm, shift, scale)


class TokenBlock(NormedBlock):
    """One whose every token has a modulation of its own."""

    def outputs(
        self, x: Float[Array, "b n d"], c: Float[Array, "b n d"]
    ) -> tuple[Array, tuple[Array, Array], Aux]:
        """The block's output, its branches before their gates; `c` is already SiLU(c)."""
        parts = self.per_token(self.adaln, c).astype(jnp.float32)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(parts, 6, axis=-1)
        attention = self.mix(self.modulated(0, x, shift1, scale1))
        x = x + gate1 * attention
        mlp = self.mlp(self.modulated(1, x, shift2, scale2))
        return x + gate2 * mlp, (attention, mlp), {}


def modulated(
    x: Float[Array, "b n d"],
    norm: Float[Array, " d"] | None,
    shift: Float[Array, "b ... d"],
    scale: Float[Array, "b ... d"],
) -> Float[Array, "b n d"]:
    """Norm (None: LayerNorm without weights), then (1 + scale) and shift of images or of tokens."""
    if shift.ndim == 2:
        shift, scale = shift[:, None], scale[:, None]
    normed = layer_norm(x) if norm is None else rms_norm(x, norm)
    return normed * (1 + scale) + shift
