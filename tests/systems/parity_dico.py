"""DiCo against arrays of the authors' code (shallowdream204/DiCo): a block, and the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ppflow_jax.convert.infer import find_config, find_kind
from ppflow_jax.convert.keys import to_torch
from ppflow_jax.convert.load import from_torch
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import Block, modulate
from ppflow_jax.models.leaves import linear_keys
from ppflow_jax.models.network import _module
from ppflow_jax.models.parts import Execution
from ppflow_jax.pyramid import Pyramid
from ppflow_jax.systems.dico_network import BLOCK, DiCoNetwork
from ppflow_jax.systems.dico_unet import LEVELS
from tests.acceptance.comparison import Row
from tests.systems.parity_moe import guidance

if TYPE_CHECKING:
    from tests.systems_parity import Reference

ADALN = tuple(linear_keys("blocks.0.adaLN_modulation.1", "blocks", "adaln", index=(0,)))
BLOCK_OF = "encoder2"  # the level whose block has arrays of its own
# Names of the original by ours
PARTS = {"patchify": "x_embedder", "down1": "down1_2", "down2": "down2_3", "up2": "up3_2"} | {
    "up1": "up2_1", "join2": "reduce_chan_level2", "join1": "reduce_chan_level1"
} | {name: level.torch for name, level in LEVELS.items()}  # fmt: skip


def rows(ref: Reference) -> Iterator[Row]:
    yield from block(ref)
    if "run/x" in ref:
        yield from network(ref)


def picture(x: Any) -> Any:
    return jnp.asarray(x).transpose(0, 2, 3, 1)


def theirs(x: Any) -> Any:
    return jnp.asarray(x).transpose(0, 3, 1, 2)


def block(ref: Reference) -> Iterator[Row]:
    """One block of a level, told a vector."""
    x, c = picture(ref["run/block_x"]), jnp.asarray(ref["run/block_c"])
    model = model_of(ref)
    level = model.network.level(model, BLOCK_OF)
    graph, _ = nnx.split(nnx.eval_shape(lambda: Block(level, Execution(), rngs=nnx.Rngs(0))))
    leaves: dict = {}
    for key in (*BLOCK.keys(0), *ADALN):
        *parents, last = key.path[1:]
        into = leaves
        for parent in parents:
            into = into.setdefault(parent, {})
        name = LEVELS[BLOCK_OF].torch + key.torch.removeprefix("blocks")
        into[last] = jnp.asarray(key.ours(ref[f"model/{name}"]))
    own = nnx.merge(graph, leaves).given(None, x.shape[1:3])

    def run(x, c):
        return own(x.reshape(len(x), -1, x.shape[-1]), jax.nn.silu(c)).reshape(x.shape)

    def inside(x, c):
        shift, scale, *_ = own.modulation(jax.nn.silu(c))
        tokens = modulate(x.reshape(len(x), -1, x.shape[-1]), shift, scale)
        a = own.dico.tokens(own.dico.first(tokens), own.grid)
        return a.reshape(x.shape), own.dico.gates(a)

    a, gates = jax.jit(inside)(x, c)
    yield from ref.row("run/block_out", theirs(jax.jit(run)(x, c)))
    yield from ref.row("run/block_attention_input", theirs(a))
    yield from ref.row("run/block_attention_gate", gates.swapaxes(1, 2)[..., None])
    total = lambda x, c: jnp.sum(theirs(run(x, c)) * ref["run/block_cotangent"])
    of_x, of_c = jax.jit(jax.grad(total, argnums=(0, 1)))(x, c)
    yield from ref.row("run/block_grad_x", theirs(of_x))
    yield from ref.row("run/block_grad_c", of_c)


def model_of(ref: Reference) -> ModelConfig:
    """The settings of the file."""
    c = ref.config
    depths = tuple(c["depth"])
    return ModelConfig(
        Pyramid.parse("1x1@1"),
        c["H"],
        channels=4,
        width=c["h"],
        depth=sum(depths),
        heads=1,
        num_classes=c["nc"],
        mlp_ratio=float(c["r"]),
        learn_sigma=c["ls"],
        network=DiCoNetwork(depths, "ddpm"),
    )


class Whole(NamedTuple):
    """With all channels, for `guidance`."""

    config: ModelConfig
    full: Callable[..., Any]


def network(ref: Reference) -> Iterator[Row]:
    """All of it: what every part gives, the output, guided and not, and gradients."""
    model, state = model_of(ref), ref.below("model")
    read = find_config(state, find_kind(state), latent_size=model.latent_size)
    yield Row(
        f"{ref.name} the architecture, from names and shapes", int(read != model), 0, "differ"
    )
    params = jax.tree.map(jnp.asarray, from_torch(model, state))
    back = to_torch(model, params)
    off = sum(not np.array_equal(back.get(name), value) for name, value in state.items())
    yield Row(f"{ref.name} tensors there and back", off + len(back.keys() - state.keys()), 0, "")
    graph, _ = nnx.split(nnx.eval_shape(lambda: _module(model, jax.random.key(0))))

    def run(params, x, n, y):
        out, found = nnx.merge(graph, params).outputs((x,), (n,), (y,), (0,))
        return out[0], {name: each[0] for name, each in found.items()}

    x, n = picture(ref["run/x"]), jnp.asarray(ref["run/t"], jnp.float32)
    y = jnp.asarray(ref["run/y"], jnp.int32)
    out, found = jax.jit(run)(params, x, n, y)
    yield from ref.row("run/out", theirs(out))
    for name, torch in PARTS.items():
        yield from ref.row(f"run/hidden/{torch}", theirs(found[name]))
    total = lambda p: jnp.sum(theirs(run(p, x, n, y)[0]) * ref["run/cotangent"])
    gradients = to_torch(model, jax.jit(jax.grad(total))(params))
    for name in ref.below("run/grad"):
        yield from ref.row(f"run/grad/{name}", gradients[name])
    for name, move in (("down", "down1"), ("up", "up2")):
        if f"run/{name}_x" in ref:
            own = nnx.merge(graph, params).moved(move, picture(ref[f"run/{name}_x"]))
            yield from ref.row(f"run/{name}_out", theirs(own))
    yield from guidance(ref, Whole(model, lambda x, n, y: jax.jit(run)(params, x, n, y)[0]), 3)
