"""The network: a DiT whose patchify and unpatchify belong to a stage of the pyramid.

Source: PPFlow (arXiv 2506.23543) on SiT (arXiv 2401.08740). Only the patch projection, the
final projection and the level embedding are per stage; the transformer blocks are shared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ppflow_jax.devices.layout import Layout, is_gather
from ppflow_jax.devices.programs import Programs, for_passes
from ppflow_jax.errors import InputError
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import Block, TimestepEmbedder, _normal, _zeros, linear, modulate
from ppflow_jax.models.patch import patchify, positions, unpatchify

Params = dict[str, Any]
# (params, x, t, y, stage) -> prediction with the shape of x, or tuples of them: see make_apply
Apply = Callable[..., Any]
# Replaces the plain scan over the blocks: (stacked blocks, tokens, SiLU(c)) -> (tokens, anything).
# The blocks are one Block whose leaves have a leading axis of depth, to be scanned over.
Trunk = Callable[[Block, Float[Array, "b n d"], Float[Array, "b d"]], tuple[Array, Any]]


REMAT_POLICIES = {
    # All but the weights gathered by `Layout.weights`: kept for the backward pass, they would be
    # the whole network on every device.
    "none": lambda operation, *inputs, **params: not is_gather(operation, *inputs, **params),
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class PPFlow(nnx.Module):
    """PPFlow / SiT network. Call it through `make_apply`."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike,
        remat: str,
        rngs: nnx.Rngs,
        programs: Programs = Programs(),
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
        if config.has_levels:
            self.level = nnx.Embed(len(pyramid), width, embedding_init=_normal, rngs=rngs)
        self.blocks = nnx.vmap(
            lambda r: Block(
                width,
                config.heads,
                config.mlp_ratio,
                dtype=dtype,
                rngs=r,
                programs=programs,
                per_device=layout.heads,
            ),
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

    def conditions(
        self,
        ts: tuple[Float[Array, " _"], ...],
        ys: tuple[Int[Array, " _"], ...],
        stages: tuple[int, ...],
    ) -> tuple[Float[Array, "_ d"], ...]:
        """Sum of time, label and level embeddings, for every stage.

        Time and label embeddings see the samples of all stages in one batch, in turn, which is
        local on a mesh. (Of one look-up per stage XLA makes one whose gradients it moves between
        the devices.)
        """
        turns = math.gcd(*map(len, ts))
        t, y = (
            jnp.concatenate([part.reshape(turns, -1) for part in parts], axis=1)
            for parts in (ts, ys)
        )
        c = self.time(t.reshape(-1)).astype(jnp.float32) + self.label(y.reshape(-1))
        cuts = list(itertools.accumulate(len(part) // turns for part in ts))[:-1]
        own = jnp.split(c.reshape(*t.shape, -1), cuts, axis=1)
        cs = [part.reshape(-1, part.shape[-1]) for part in own]
        if self.config.has_levels:
            cs = [c + self.level(jnp.full(len(c), stage)) for c, stage in zip(cs, stages)]
        return tuple(map(self.layout.batch, cs))

    def trunk(
        self,
        hs: tuple[Float[Array, "_ _ d"], ...],
        cs: tuple[Float[Array, "_ d"], ...],
        layers: tuple[Params, ...] = (),
    ) -> tuple[Float[Array, "_ _ d"], ...]:
        """The shared blocks, scanned over depth; each of `cs` is already SiLU(c).

        With `layers` (see `unstacked`) their parameters, one after another, instead.

        Several stages pass a block side by side, each with its own token count, so that its
        weights are gathered, and their gradients summed over a mesh, once for all of them.
        """

        def body(hs, block):
            # Weights cross the mesh in the dtype of the matrix products, which is all they enter.
            block = jax.tree.map(lambda p: p.astype(self.dtype), block)
            block = self.layout.weights(block, "blocks/")
            return tuple(self.layout.batch(block(h, c)) for h, c in zip(hs, cs)), None

        if not layers:
            policy = REMAT_POLICIES[self.remat]
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
            return jax.lax.scan(body, hs, self.blocks)[0]
        block = nnx.split(self.blocks)[0]
        for layer in layers:
            # Without the barrier the compiler sums up all blocks again where it needs the last.
            hs = jax.lax.optimization_barrier(body(hs, nnx.merge(block, layer))[0])
        return hs

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
        if trunk is None:
            return self.side_by_side((x,), (t,), (y,), (stage,))[0]
        c = jax.nn.silu(self.conditions((t,), (y,), (stage,))[0])
        h, extra = trunk(self.blocks, self.tokens(x, stage), c)
        return self.prediction(h, c, stage), extra

    def side_by_side(
        self, xs, ts, ys, stages: tuple[int, ...], layers: tuple[Params, ...] = ()
    ) -> tuple[Array, ...]:
        """The predictions of several stages, each as `__call__`, in one pass over the blocks."""
        cs = tuple(map(jax.nn.silu, self.conditions(ts, ys, stages)))
        hs = self.trunk(tuple(self.tokens(*each) for each in zip(xs, stages)), cs, layers)
        return tuple(self.prediction(*each) for each in zip(hs, cs, stages))

    def prediction(
        self, h: Float[Array, "b n d"], c: Float[Array, "b d"], stage: int
    ) -> Float[Array, "b h w c"]:
        """What the tokens that leave the trunk predict."""
        config = self.config
        grid = config.pyramid.grid(stage, config.latent_size)
        out = unpatchify(self.final(h, c, stage), grid, config.pyramid.stages[stage].patch)
        return out[..., : config.channels]


def _module(
    config: ModelConfig,
    key: jax.Array,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    programs: Programs = Programs(),
    layout: Layout = Layout(),
) -> PPFlow:
    return PPFlow(
        config, dtype=dtype, remat=remat, rngs=nnx.Rngs(key), programs=programs, layout=layout
    )


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters as a plain nested dict (a fresh model outputs zeros)."""
    state = nnx.state(_module(config, key), nnx.Param)
    return jax.tree.map(jnp.asarray, nnx.to_pure_dict(state))


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of `init_params` without touching memory."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def unstacked(params: Params) -> Params:
    """The same parameters with a tuple of blocks in the place of their stack, for `make_apply`.

    A scan copies the weights of every block out of the stack and, in training, what the backward
    pass needs into one. Without it compiling takes longer with depth. For passes without a trunk of
    one's own and without remat.
    """
    stack, tree = jax.tree.flatten(params["blocks"])
    # The gradient of a split is one concatenation; that of slices would be a sum of padded ones.
    parts = [jax.lax.split(leaf, (1,) * len(leaf)) for leaf in stack]
    layers = (tree.unflatten([part[0] for part in layer]) for layer in zip(*parts))
    return params | {"blocks": tuple(layers)}


def make_apply(
    config: ModelConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    programs: Programs | None = None,
    layout: Layout = Layout(),
) -> Apply:
    """The network as a pure function `apply(params, x, t, y, stage, trunk=None)`.

    x float32 [b, h, w, c] latent; t float32 [b] in [0, 1]; y int32 [b], null label allowed;
    stage a Python int. Returns float32 [b, h, w, c]: the velocity, score or noise it was
    trained to predict. With a tuple for each of x, t, y and stage: a tuple of predictions, in one
    pass over the blocks. `params` may be `unstacked`. `dtype` is that of the matrix products,
    `programs` how it is computed (None: as suits passes on the default device), `layout` that of
    the mesh.
    `trunk` (see `Trunk`) replaces the scan over the blocks, whose weights are then all gathered at
    once; the result is (prediction, what the trunk returned besides).

    Raises:
      InputError: unknown remat policy, or a policy for unrolled blocks.
    """
    programs = programs or for_passes(dtype=dtype, head=config.head_width)
    if remat not in REMAT_POLICIES:
        raise InputError(f"unknown remat policy {remat!r}: one of {', '.join(REMAT_POLICIES)}")
    if programs.unrolled and remat != "none":
        raise InputError(f"remat {remat!r} is for blocks that are scanned: choose none")
    graphdef, _ = nnx.split(
        nnx.eval_shape(lambda: _module(config, jax.random.key(0), dtype, remat, programs, layout))
    )

    def apply(params, x, t, y, stage, trunk=None):
        if programs.unrolled and trunk is None:
            params = unstacked(params)
        here = {name: part for name, part in params.items() if trunk or name != "blocks"}
        params = params | layout.weights(here, "")
        layers = params["blocks"] if isinstance(params["blocks"], tuple) else ()
        network = nnx.merge(graphdef, params | {"blocks": layers[0]} if layers else params)
        if trunk is not None:
            return network(x, t, y, stage, trunk)
        if isinstance(stage, tuple):
            return network.side_by_side(x, t, y, stage, layers)
        return network.side_by_side((x,), (t,), (y,), (stage,), layers)[0]

    return apply
