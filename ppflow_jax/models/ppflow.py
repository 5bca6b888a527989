"""The network: a DiT whose patchify and unpatchify belong to a stage of the pyramid.

Source: PPFlow (arXiv 2506.23543) on SiT (arXiv 2401.08740). Only the patch projection, the
final projection and the level embedding are per stage; the transformer blocks are shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ppflow_jax.errors import InputError
from ppflow_jax.models.layers import (
    Block,
    TimestepEmbedder,
    _normal,
    _zeros,
    linear,
    modulate,
)
from ppflow_jax.models.patch import patchify, positions, unpatchify
from ppflow_jax.pyramid import Pyramid

Params = dict[str, Any]
# (params, x, t, y, stage) -> prediction with the shape of x; with trunk=T also what T returns
Apply = Callable[..., Any]
# Replaces the plain scan over the blocks: (stacked blocks, tokens, SiLU(c)) -> (tokens, anything).
# The blocks are one Block whose leaves have a leading axis of depth, to be scanned over.
Trunk = Callable[[Block, Float[Array, "b n d"], Float[Array, "b d"]], tuple[Array, Any]]

# DiT, arXiv 2212.09748, Table 1.
SIZES = {
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
    "XL": dict(width=1152, depth=28, heads=16),
}

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclass(frozen=True)
class ModelConfig:
    """Architecture, as stored inside every checkpoint.

    Attributes:
      pyramid: patch size over time.
      latent_size: side of the square latent, in latent pixels.
      channels: channels of the latent.
      width, depth, heads: trunk.
      num_classes: classes without the null class, whose label is `num_classes`.
      mlp_ratio: hidden width of the MLP over `width`.
      learn_sigma: the final projection also has the unused variance channels of DiT; the public
        PyTorch weights have them.

    Raises:
      InputError: a patch does not divide the latent, or heads do not divide the width.
    """

    pyramid: Pyramid
    latent_size: int
    channels: int
    width: int
    depth: int
    heads: int
    num_classes: int
    mlp_ratio: float = 4.0
    learn_sigma: bool = True

    def __post_init__(self):
        sizes = (self.latent_size, self.channels, self.width, self.depth, self.heads)
        if min(*sizes, self.num_classes) < 1:
            raise InputError(f"model sizes must all be at least 1, got {self}")
        for stage in range(len(self.pyramid)):
            self.pyramid.grid(stage, self.latent_size)
        if self.width % self.heads or self.width % 4:
            raise InputError(
                f"width {self.width} must be divisible by heads ({self.heads}) and by 4 "
                "(sin-cos positions)"
            )

    @property
    def null_label(self) -> int:
        return self.num_classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Latent shape (h, w, c)."""
        return (self.latent_size, self.latent_size, self.channels)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"pyramid": str(self.pyramid)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ModelConfig:
        known = {f.name for f in fields(cls)}
        if unknown := set(values) - known:
            raise InputError(f"model config has unknown keys {sorted(unknown)}: update ppflow_jax")
        return cls(**(values | {"pyramid": Pyramid.parse(values["pyramid"])}))


class PPFlow(nnx.Module):
    """PPFlow / SiT network. Call it through `make_apply`."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, remat: str, rngs: nnx.Rngs):
        self.config, self.dtype, self.remat = config, dtype, remat
        width, pyramid = config.width, config.pyramid
        out_channels = config.channels * (2 if config.learn_sigma else 1)
        areas = [s.patch[0] * s.patch[1] for s in pyramid.stages]
        self.patchify = nnx.List(
            [linear(a * config.channels, width, rngs, dtype=dtype) for a in areas]
        )
        self.time = TimestepEmbedder(width, dtype=dtype, rngs=rngs)
        self.label = nnx.Embed(config.num_classes + 1, width, embedding_init=_normal, rngs=rngs)
        if len(pyramid) > 1:
            self.level = nnx.Embed(len(pyramid), width, embedding_init=_normal, rngs=rngs)
        self.blocks = nnx.vmap(
            lambda r: Block(width, config.heads, config.mlp_ratio, dtype=dtype, rngs=r),
            in_axes=0,
            out_axes=0,
        )(rngs.split(config.depth))
        self.final_adaln = linear(width, 2 * width, rngs, dtype=dtype, init=_zeros)
        # The final projection stays in float32 (see docs of dtype in configs/common.py).
        self.unpatchify = nnx.List(
            [linear(width, a * out_channels, rngs, dtype=jnp.float32, init=_zeros) for a in areas]
        )

    def tokens(self, x: Float[Array, "b h w c"], stage: int) -> Float[Array, "b n d"]:
        """Patch projection of one stage plus its positions."""
        patch = self.config.pyramid.stages[stage].patch
        pos = positions(self.config.pyramid, stage, self.config.latent_size, self.config.width)
        tokens = self.patchify[stage](patchify(x, patch)).astype(jnp.float32)
        return tokens + jnp.asarray(pos)[None]

    def condition(
        self, t: Float[Array, " b"], y: Int[Array, " b"], stage: int
    ) -> Float[Array, "b d"]:
        """Sum of time, label and level embeddings."""
        c = self.time(t).astype(jnp.float32) + self.label(y)
        if len(self.config.pyramid) > 1:
            c = c + self.level(jnp.full(y.shape, stage))
        return c

    def trunk(self, h: Float[Array, "b n d"], c: Float[Array, "b d"]) -> Float[Array, "b n d"]:
        """The shared blocks, scanned over depth; `c` is already SiLU(c)."""

        def body(h, block):
            return block(h, c), None

        if self.remat != "none":
            body = jax.checkpoint(body, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        return jax.lax.scan(body, h, self.blocks)[0]

    def final(
        self, h: Float[Array, "b n d"], c: Float[Array, "b d"], stage: int
    ) -> Float[Array, "b n o"]:
        """Final adaLN and projection of one stage, in float32; `c` is already SiLU(c)."""
        shift, scale = jnp.split(self.final_adaln(c).astype(jnp.float32), 2, axis=-1)
        return self.unpatchify[stage](modulate(h, shift, scale))

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        y: Int[Array, " b"],
        stage: int,
        trunk: Trunk | None = None,
    ) -> Float[Array, "b h w c"] | tuple[Float[Array, "b h w c"], Any]:
        config, extra = self.config, None
        c = jax.nn.silu(self.condition(t, y, stage))
        h = self.tokens(x, stage)
        if trunk is None:
            h = self.trunk(h, c)
        else:
            h, extra = trunk(self.blocks, h, c)
        grid = config.pyramid.grid(stage, config.latent_size)
        out = unpatchify(self.final(h, c, stage), grid, config.pyramid.stages[stage].patch)
        out = out[..., : config.channels]
        return out if trunk is None else (out, extra)


def _module(config: ModelConfig, key: jax.Array, dtype: DTypeLike, remat: str) -> PPFlow:
    return PPFlow(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(key))


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters as a plain nested dict (a fresh model outputs zeros)."""
    state = nnx.state(_module(config, key, jnp.float32, "none"), nnx.Param)
    return jax.tree.map(jnp.asarray, nnx.to_pure_dict(state))


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of `init_params` without touching memory."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def make_apply(
    config: ModelConfig, *, dtype: DTypeLike = jnp.float32, remat: str = "none"
) -> Apply:
    """The network as a pure function `apply(params, x, t, y, stage, trunk=None)`.

    x float32 [b, h, w, c] latent; t float32 [b] in [0, 1]; y int32 [b], null label allowed;
    stage a Python int. Returns float32 [b, h, w, c]: the velocity, score or noise it was
    trained to predict. `dtype` is that of the matrix products. `trunk` (see `Trunk`) replaces
    the scan over the blocks; the result is then (prediction, what the trunk returned besides).

    Raises:
      InputError: unknown remat policy.
    """
    if remat not in REMAT_POLICIES:
        raise InputError(f"unknown remat policy {remat!r}: one of {', '.join(REMAT_POLICIES)}")
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: _module(config, jax.random.key(0), dtype, remat))
    )

    def apply(params, x, t, y, stage, trunk=None):
        return nnx.merge(graphdef, params)(x, t, y, stage, trunk)

    return apply
