"""A block of DiCo against arrays of the authors' code (shallowdream204/DiCo)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from ppflow_jax.models.layers import layer_norm
from ppflow_jax.models.parts import Execution
from ppflow_jax.systems.dico import Convolution, DiCo
from tests.acceptance.comparison import Row

if TYPE_CHECKING:
    from tests.systems_parity import Reference

BLOCK = "encoder_level_2.0"  # the one whose arrays are given


def rows(ref: Reference) -> Iterator[Row]:
    start = f"{BLOCK}."
    weights = {
        name.removeprefix(start): jnp.asarray(w)
        for name, w in ref.below("model").items()
        if name.startswith(start)
    }
    x, c = jnp.asarray(ref["run/block_x"]), jnp.asarray(ref["run/block_c"])
    grid, width = x.shape[2:], x.shape[1]
    graph, _ = nnx.split(nnx.eval_shape(lambda: Convolution(width, Execution(), nnx.Rngs(0))))
    leaves: dict = {}
    for key in DiCo().keys(0):
        *parents, last = key.path[2:]
        name = key.torch.removeprefix("blocks.0.")
        into = leaves.setdefault(parents[0], {}) if parents else leaves
        into[last] = jnp.asarray(key.ours(ref[f"model/{start}{name}"]))
    own = nnx.merge(graph, leaves)

    def modulated(x, shift, scale):
        return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]

    def run(x, c):
        """The whole block; its MLP has the exact gelu, which DiT's has not."""
        h = x.reshape(*x.shape[:2], -1).swapaxes(1, 2)
        w = lambda name: weights[f"{name}.weight"].reshape(weights[f"{name}.weight"].shape[:2]).T
        adaln = jax.nn.silu(c) @ w("adaLN_modulation.1") + weights["adaLN_modulation.1.bias"][None]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(adaln, 6, axis=-1)
        a = own.tokens(own.first(modulated(h, shift1, scale1)), grid)
        gates = own.gates(a)
        h = h + gate1[:, None] * own.last(a * gates)
        y = modulated(h, shift2, scale2) @ w("conv4") + weights["conv4.bias"][None, None]
        y = jax.nn.gelu(y, approximate=False) @ w("conv5") + weights["conv5.bias"][None, None]
        return h + gate2[:, None] * y, a, gates

    def picture(tokens):
        return tokens.swapaxes(1, 2).reshape(len(tokens), width, *grid)

    out, a, gates = jax.jit(run)(x, c)
    yield from ref.row("run/block_out", picture(out))
    yield from ref.row("run/block_attention_input", picture(a))
    yield from ref.row("run/block_attention_gate", gates.swapaxes(1, 2)[..., None])
    total = lambda x, c: jnp.sum(picture(run(x, c)[0]) * ref["run/block_cotangent"])
    of_x, of_c = jax.jit(jax.grad(total, argnums=(0, 1)))(x, c)
    yield from ref.row("run/block_grad_x", of_x)
    yield from ref.row("run/block_grad_c", of_c)
