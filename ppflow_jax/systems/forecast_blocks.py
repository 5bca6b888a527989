"""Blocks whose branches are recorded and forecast (see forecast.py)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from ppflow_jax.models.layers import Block


def combine(ring: Float[Array, "slots ..."], weights: Float[Array, " slots"]) -> Array:
    """Weighted sum of the slots in float32."""
    return sum(slot.astype(jnp.float32) * weight for slot, weight in zip(ring, weights))


def write(ring: Float[Array, "s ..."], value: Array, slot: Integer[Array, ""]) -> Array:
    return jax.lax.dynamic_update_index_in_dim(ring, value, slot, 0)


def depth_of(blocks: Block) -> int:
    return jax.tree.leaves(blocks)[0].shape[0]


def record_branches(
    rings: list[Float[Array, "depth s b n d"]],
    slot: Integer[Array, ""],
    blocks: Block,
    h: Float[Array, "b n d"],
    c: Float[Array, "b d"],
) -> tuple[Float[Array, "b n d"], list[Float[Array, "depth s b n d"]]]:
    """The plain trunk; besides, the rings with the raw branches of every block in one slot."""

    def body(carry, xs):
        h, rings = carry
        block, layer = xs
        h, *branches = block.branches(h, c)
        place = (layer, slot, *[jnp.zeros_like(slot)] * 3)
        rings = [
            jax.lax.dynamic_update_slice(ring, branch[None, None], place)
            for ring, branch in zip(rings, branches)
        ]
        return (h, rings), None

    layers = np.arange(depth_of(blocks), dtype=slot.dtype)
    return jax.lax.scan(body, (h, rings), (blocks, layers))[0]


def forecast_branches(
    memory: Any,
    weights: Float[Array, " h"],
    blocks: Block,
    h: Float[Array, "b n d"],
    c: Float[Array, "b d"],
):
    """The trunk with forecast branches, under the gates of this evaluation."""

    def body(h, layer):
        block, rings = layer
        return block.gated(h, c, *(combine(ring, weights) for ring in rings)), None

    return jax.lax.scan(body, h, (blocks, memory))[0]


def run_blocks(
    blocks: Block, h: Float[Array, "b n d"], c: Float[Array, "b d"], first: int, last: int
):
    """Blocks `first` to `last` (exclusive), taken from the stack one by one."""

    def body(h, i):
        block = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, keepdims=False), blocks)
        return block(h, c), None

    return jax.lax.scan(body, h, jnp.arange(first, last))[0]
