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
from jax.ad_checkpoint import checkpoint_name
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
# (params, x, t, y, stage) -> prediction with the shape of x
Apply = Callable[..., Float[Array, "b h w c"]]

# DiT, arXiv 2212.09748, Table 1.
SIZES = {
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
    "XL": dict(width=1152, depth=28, heads=16),
}

WEIGHTS = "weights"  # the scope in which weights are made ready

# Weights are never kept from the forward to the backward pass: they are cast and gathered again.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(WEIGHTS),
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


def _as_it_is(tree: Any, prefix: str = "") -> Any:
    return tree


@dataclass(frozen=True)
class Layout:
    """Where arrays live on a device mesh while the network runs (see `sharding.layout`).

    Attributes:
      batch: keeps activations split over their first axis.
      weights: (tree, prefix of its paths) -> the weights as they are needed for computing. Blocks
        pass through it one at a time, so that no device ever holds all of them.
    """

    batch: Callable[[Array], Array] = _as_it_is
    weights: Callable[[Any, str], Any] = _as_it_is


class PPFlow(nnx.Module):
    """PPFlow / SiT network. Call it through `make_apply`."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike,
        remat: str,
        rngs: nnx.Rngs,
        layout: Layout = Layout(),
    ):
        self.config, self.dtype, self.remat, self.layout = config, dtype, remat, layout
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
        return self.layout.batch(tokens + jnp.asarray(pos)[None])

    def condition(
        self, t: Float[Array, " b"], y: Int[Array, " b"], stage: int
    ) -> Float[Array, "b d"]:
        """Sum of time, label and level embeddings."""
        c = self.time(t).astype(jnp.float32) + self.label(y)
        if len(self.config.pyramid) > 1:
            c = c + self.level(jnp.full(y.shape, stage))
        return self.layout.batch(c)

    def trunk(self, h: Float[Array, "b n d"], c: Float[Array, "b d"]) -> Float[Array, "b n d"]:
        """The shared blocks, scanned over depth; `c` is already SiLU(c)."""

        def body(h, block):
            with jax.named_scope(WEIGHTS):
                # They cross the mesh in the dtype of the matrix products, which is all they enter.
                block = jax.tree.map(lambda p: p.astype(self.dtype), block)
                block = checkpoint_name(self.layout.weights(block, "blocks/"), WEIGHTS)
            return self.layout.batch(block(h, c)), None

        body = jax.checkpoint(body, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        return jax.lax.scan(body, h, self.blocks)[0]

    def final(
        self, h: Float[Array, "b n d"], c: Float[Array, "b d"], stage: int
    ) -> Float[Array, "b n o"]:
        """Final adaLN and projection of one stage, in float32; `c` is already SiLU(c)."""
        shift, scale = jnp.split(self.final_adaln(c).astype(jnp.float32), 2, axis=-1)
        return self.unpatchify[stage](modulate(h, shift, scale))

    def __call__(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"], y: Int[Array, " b"], stage: int
    ) -> Float[Array, "b h w c"]:
        config = self.config
        c = jax.nn.silu(self.condition(t, y, stage))
        h = self.trunk(self.tokens(x, stage), c)
        grid = config.pyramid.grid(stage, config.latent_size)
        out = unpatchify(self.final(h, c, stage), grid, config.pyramid.stages[stage].patch)
        return out[..., : config.channels]


def _module(
    config: ModelConfig,
    key: jax.Array,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    layout: Layout = Layout(),
) -> PPFlow:
    return PPFlow(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(key), layout=layout)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters as a plain nested dict (a fresh model outputs zeros)."""
    state = nnx.state(_module(config, key), nnx.Param)
    return jax.tree.map(jnp.asarray, nnx.to_pure_dict(state))


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of `init_params` without touching memory."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def make_apply(
    config: ModelConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    layout: Layout = Layout(),
) -> Apply:
    """The network as a pure function `apply(params, x, t, y, stage)`.

    x float32 [b, h, w, c] latent; t float32 [b] in [0, 1]; y int32 [b], null label allowed;
    stage a Python int. Returns float32 [b, h, w, c]: the velocity, score or noise it was
    trained to predict. `dtype` is that of the matrix products, `layout` that of the mesh.

    Raises:
      InputError: unknown remat policy.
    """
    if remat not in REMAT_POLICIES:
        raise InputError(f"unknown remat policy {remat!r}: one of {', '.join(REMAT_POLICIES)}")
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: _module(config, jax.random.key(0), dtype, remat, layout))
    )

    def apply(params, x, t, y, stage):
        rest = {name: part for name, part in params.items() if name != "blocks"}
        with jax.named_scope(WEIGHTS):
            params = params | layout.weights(rest, "")
        return nnx.merge(graphdef, params)(x, t, y, stage)

    return apply
