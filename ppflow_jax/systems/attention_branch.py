"""Blocks whose attention another method computes; everything else of them stays."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from ppflow_jax.models.attention import attend
from ppflow_jax.models.layers import Attention, Block


def with_attention(
    block: Block,
    x: Float[Array, "b n d"],
    c: Float[Array, "b d"],
    attention: Callable[[Float[Array, "b n d"]], Float[Array, "b n d"]],
) -> Float[Array, "b n d"]:
    """The block's output, with `attention` of what enters it in the place of its own.

    Args:
      c: already SiLU(c).
    """
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)
    outer, wrap = x, block.spec.wrap
    x = inner = x if wrap is None else wrap(block, x)
    x = x + gate1[:, None] * attention(block.modulated(0, x, shift1, scale1))
    x = x + gate2[:, None] * block.mlp(block.modulated(1, x, shift2, scale2))
    return x if wrap is None else x + (outer - inner)


def attended(
    attention: Attention,
    q: Float[Array, "b n h e"],
    k: Float[Array, "b m h e"],
    v: Float[Array, "b m h e"],
) -> Float[Array, "b n d"]:
    """What leaves the module for these queries, keys and values."""
    out = attend(attention.programs.attention, q, k, v, None, attention.per_device)
    return projected(attention, out)


def projected(attention: Attention, out: Float[Array, "b n h e"]) -> Float[Array, "b n d"]:
    """The output projection of the heads."""
    return attention.per_token(attention.out, out.reshape(*out.shape[:2], -1))


def at(layers: Array, i: Array) -> Array:
    """One of an axis of depth."""
    return jax.lax.dynamic_index_in_dim(layers, i, keepdims=False)
