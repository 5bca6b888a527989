"""The network: a DiT whose patchify and unpatchify belong to a stage of the pyramid.

Source: PPFlow (arXiv 2506.23543) on SiT (arXiv 2401.08740). Only the patch projection, the
final projection and the level embedding are per stage; the transformer blocks are shared.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ppflow_jax.devices.layout import Layout
from ppflow_jax.devices.programs import Programs, for_passes
from ppflow_jax.devices.sharding import is_stacked
from ppflow_jax.errors import InputError
from ppflow_jax.models.adapters import attach
from ppflow_jax.models.backbone import whole
from ppflow_jax.models.conditions import Cond, Told, split
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.feedback import refuse, turn
from ppflow_jax.models.layers import Block, TimestepEmbedder, _normal, _zeros, linear, modulate
from ppflow_jax.models.norms import entering
from ppflow_jax.models.parts import Aux, Execution, FullAttention
from ppflow_jax.models.patch import patchify, positions, unpatchify
from ppflow_jax.models.stack import (
    Output,
    Params,
    Stack,
    Taps,
    apart,
    check_remat,
    joined,
    unstacked,
)
from ppflow_jax.models.student_blocks import chosen, make, passed, walk
from ppflow_jax.models.students import STUDENTS, Student, check_call

# (params, x, t, y, stage) -> prediction with the shape of x, or Outputs of stages: see make_apply
Apply = Callable[..., Any]
# Replaces the plain scan over the blocks: (stacked blocks, tokens, SiLU(c)) -> (tokens, anything).
# The blocks are one Block whose leaves have a leading axis of depth, to be scanned over.
Trunk = Callable[[Block, Float[Array, "b n d"], Float[Array, "b d"]], tuple[Array, Any]]


class PPFlow(nnx.Module):
    """PPFlow / SiT network. Call it through `make_apply`."""

    on: tuple[Student, ...] = ()  # that stand in the place of blocks

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike,
        remat: str,
        rngs: nnx.Rngs,
        programs: Programs = Programs(),
        layout: Layout = Layout(),
        one_time: bool = False,
    ):
        self.config, self.remat, self.layout = config, remat, layout
        self.run, self.one_time = Execution(dtype, programs, layout), one_time
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
        self.blocks = nnx.vmap(lambda r: Block(config, self.run, rngs=r), in_axes=0, out_axes=0)(
            rngs.split(config.depth)
        )
        self.final_adaln = linear(width, 2 * width, rngs, dtype=dtype, init=_zeros)
        # The final projection stays in float32 (see docs of dtype in configs/common.py).
        self.unpatchify = nnx.List(
            [linear(width, a * out_channels, rngs, dtype=jnp.float32, init=_zeros) for a in areas]
        )
        if config.conditions:  # last, so that the leaves before them start as without them
            self.conditions = nnx.Dict(
                {c.name: c.module(config, self.run, rngs) for c in config.conditions}
            )
        attach(self, config, rngs)
        if config.students:
            self.students = make(config, self.run, rngs)

    def tokens(self, x: Float[Array, "b h w c"], stage: int, told: Told) -> Float[Array, "b n d"]:
        """Patch projection of one stage, of the latent and of conditions, plus its positions."""
        patch = self.config.pyramid.stages[stage].patch
        pos = positions(self.config.pyramid, stage, self.config.latent_size, self.config.width)
        tokens = self.patchify[stage](patchify(x, patch)).astype(jnp.float32)
        for c in self.config.conditions:
            if c.enters == "input":
                values = told.values[c.name]
                tokens += c.tokens(self.conditions[c.name], values, stage, patch)
        return self.layout.batch(tokens + jnp.asarray(pos)[None])

    def embeddings(
        self,
        ts: tuple[Float[Array, " _"], ...],
        told: tuple[Told, ...],
        stages: tuple[int, ...],
    ) -> tuple[Float[Array, "_ d"], ...]:
        """Sum of time, label and level embeddings, for every stage.

        Time and label embeddings see the samples of all stages in one batch, in turn, which is
        local on a mesh. (Of one look-up per stage XLA makes one whose gradients it moves between
        the devices.)
        """
        turns = math.gcd(*map(len, ts))
        t, y = joined(ts, turns), joined(tuple(each.labels for each in told), turns)
        more = None
        for s in self.config.conditions:
            if s.enters == "vector":
                values = joined(tuple(each.values[s.name] for each in told), turns)
                vector = s.vector(self.conditions[s.name], values.reshape(-1))
                more = vector if more is None else more + vector
        c = self.time(t.reshape(-1), more).astype(jnp.float32) + self.label(y.reshape(-1))
        cs = apart(c, tuple(map(len, ts)), turns)
        if self.config.has_levels:
            cs = [c + self.level(jnp.full(len(c), stage)) for c, stage in zip(cs, stages)]
        return tuple(map(self.layout.batch, cs))

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
        y: Cond,
        stage: int,
        trunk: Trunk | None = None,
    ) -> Float[Array, "b h w c"] | tuple[Float[Array, "b h w c"], Any]:
        if trunk is None:
            return self.by_stage((x,), (t,), (y,), (stage,))[0].prediction
        refuse(self.config)
        told = split(self.config.conditions, y)
        vector = self.embeddings((t,), (told,), (stage,))[0]
        c = jax.nn.silu(vector)
        stack = Stack(self.blocks, (), self.run, self.remat)
        signal, _ = self.signals(stack, t)
        blocks = passed(self, stack, stage)[0][0].blocks.given(signal, self.grid(stage))
        h, seen = entering(self.config.block.norm, self.tokens(x, stage, told), c, vector, t)
        h, extra = trunk(blocks, h, seen)
        return self.prediction(h, c, stage), extra

    def by_stage(
        self,
        xs,
        ts,
        ys,
        stages: tuple[int, ...],
        layers: tuple[Params, ...] = (),
        taps: Taps = Taps(),
        drawn: tuple[Any, ...] = (),
    ) -> tuple[Output, ...]:
        """Of several stages, each predicted as by `__call__`, in one pass over the blocks.

        With `layers` (see `unstacked`) the blocks have their parameters.
        """
        each = [(own,) for own in drawn] or [()] * len(ts)
        told = tuple(split(self.config.conditions, y) for y in ys)
        vectors = self.embeddings(ts, told, stages)
        cs = tuple(map(jax.nn.silu, vectors))
        hs = tuple(self.tokens(*each) for each in zip(xs, stages, told))
        norms = (self.config.block.norm,) * len(stages)
        hs, seen = zip(*map(entering, norms, hs, cs, vectors, ts))
        stack = Stack(self.blocks, layers, self.run, self.remat)
        signals, given = zip(*(self.signals(stack, t, *own) for t, own in zip(ts, each)))
        if self.on:  # every stage passes blocks of its own
            walks = zip(stages, hs, seen)
            hs, auxes, found = zip(*(walk(self, stack, *one, taps) for one in walks))
        else:
            changes = turn(self.config, lambda: self.conditions, vectors)
            grids = tuple(map(self.grid, stages))
            hs, seen, auxes, found = stack(hs, seen, signals, grids, taps, changes)
            cs = seen if changes else cs
        predictions = (self.prediction(*each) for each in zip(hs, cs, stages))
        terms = (self.config.block.terms(aux | more) for aux, more in zip(auxes, given))
        return tuple(map(Output, predictions, terms, found))

    def grid(self, stage: int) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.config.pyramid.grid(stage, self.config.latent_size)

    def signals(self, stack: Stack, t: Float[Array, " b"], *drawn: Any) -> tuple[Any, Aux]:
        """What the wrap of the blocks has for them at these times, see `models.parts.Wrap`."""
        wrap = self.config.block.wrap
        if wrap is None:
            return None, {}
        times = t[:1] if self.one_time else t
        return wrap.signals(stack.leaves(wrap.kind), self.time, times, *drawn)

    def prediction(
        self, h: Float[Array, "b n d"], c: Float[Array, "b d"], stage: int
    ) -> Float[Array, "b h w c"]:
        """What the tokens that leave the trunk predict."""
        config = self.config
        patch = config.pyramid.stages[stage].patch
        out = unpatchify(self.final(h, c, stage), self.grid(stage), patch)
        return out[..., : config.channels]


def _module(config: ModelConfig, key, dtype=jnp.float32, remat="none", **options) -> nnx.Module:
    make = PPFlow if config.network is None else config.network.module
    return make(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(key), **options)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters as a plain nested dict (a fresh model outputs zeros)."""
    state = nnx.state(_module(config, key), nnx.Param)
    return jax.tree.map(jnp.asarray, nnx.to_pure_dict(state))


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of `init_params` without touching memory."""
    return jax.tree.map(lambda leaf: leaf, _shapes(config))  # its dicts are the caller's own


@functools.lru_cache(maxsize=64)
def _shapes(config: ModelConfig) -> Params:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


@functools.lru_cache(maxsize=64)
def _graphdef(config: ModelConfig, dtype: DTypeLike, remat: str, **options: Any) -> nnx.GraphDef:
    """What a module of these is but for its leaves; to trace one takes 0.2 s."""
    made = nnx.eval_shape(lambda: _module(config, jax.random.key(0), dtype, remat, **options))
    return nnx.split(made)[0]


def make_apply(
    config: ModelConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    programs: Programs | None = None,
    layout: Layout = Layout(),
    one_time: bool = False,
) -> Apply:
    """The network as a pure function `apply(params, x, t, y, stage, trunk, taps, parts, on)`.

    x float32 [b, h, w, c] latent; t float32 [b] in [0, 1]; y int32 [b], null label allowed, of a
    model with conditions {"label": y, name: values} (see `models.conditions`); stage a Python int.
    Returns float32 [b, h, w, c]: the velocity, score or noise it learned. With a tuple for each of
    x, t, y and stage: an `Output` of each, in one pass over the blocks; with `taps` an `Output` of
    one stage too. With `parts`, a function of the `BlockSpec`, blocks compute with the parts that
    it gives, on the same leaves; of the students those that are `on` stand in the place of blocks
    (see `models.students`; None: all); what is drawn for the wrap of the blocks is given by its
    kind, one for each stage. `params` may be `unstacked`. `dtype` is that of the matrix products,
    `programs` how it is computed (None: as suits passes here), `layout` that of the mesh. With
    `one_time` all images of a call have one time. `trunk` (see `Trunk`) replaces the scan over the
    blocks, whose weights are then all gathered at once; it gives (prediction, what it returned).

    Raises:
      InputError: unknown remat policy, or one for unrolled blocks; in `apply`, taps there are not,
        or a trunk for blocks some of whose FFNs are students.
    """
    programs = programs or for_passes(dtype=dtype, head=config.head_width)
    check_remat(remat, programs)
    graphdef = _graphdef(config, dtype, remat, programs=programs, layout=layout, one_time=one_time)
    if config.network is not None and not config.has_trunk:
        return whole(config.network, graphdef, layout)

    def apply(params, x, t, y, stage, trunk=None, taps=Taps(), **choice):
        taps.check(config.depth)
        spec, on, own = chosen(config, **choice)
        check_call(config, stage, on, taps, trunk is not None)
        if taps.logits and not isinstance(spec.mixer, FullAttention):
            raise InputError(f"logits of attention: in the blocks there is {spec.mixer} instead")
        if programs.unrolled and trunk is None:
            params = unstacked(params)
        here = {k: v for k, v in params.items() if trunk or not (is_stacked(k) or k == STUDENTS)}
        params = params | layout.weights(here, "")
        layers = params["blocks"] if isinstance(params["blocks"], tuple) else ()
        network = nnx.merge(graphdef, params | {"blocks": layers[0]} if layers else params)
        network.blocks.spec, network.on = spec, on
        if trunk is not None:
            return network(x, t, y, stage, trunk)
        if isinstance(stage, tuple):
            return network.by_stage(x, t, y, stage, layers, taps, own)
        output = network.by_stage((x,), (t,), (y,), (stage,), layers, taps)[0]
        return output if taps else output.prediction

    return apply
