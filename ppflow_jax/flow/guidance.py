"""Classifier-free guidance (arXiv 2207.12598) and autoguidance (arXiv 2406.02507)."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# (x, t, y, stage) -> prediction with the shape of x
Predict = Callable[[Array, Array, Array, int], Array]


def guided(
    network: Predict,
    x: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    y: Int[Array, " b"],
    stage: int,
    scale: Float[Array, ""] | float,
    null_label: int,
    channels: int,
) -> Float[Array, "b h w c"]:
    """u + scale (c - u), c with the label and u with the null class, from one doubled batch.

    `channels` > 0 guides only the first ones; the others keep c (the PyTorch code guides 3 of
    4). A scale of 1 is c: callers who know it beforehand call `network` and save half.
    """

    def pairs(first: Array, second: Array) -> Array:
        # The two halves of an image are neighbours, so that a batch split over devices stays put.
        return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])

    both = network(pairs(x, x), pairs(t, t), pairs(y, jnp.full_like(y, null_label)), stage)
    return _extrapolate(both[0::2], both[1::2], scale, channels)


def autoguided(
    network: Predict,
    weak: Predict,
    x: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    y: Int[Array, " b"],
    stage: int,
    scale: Float[Array, ""] | float,
    channels: int,
) -> Float[Array, "b h w c"]:
    """w + scale (c - w), w by a weaker network that sees the same labels; no null class."""
    return _extrapolate(network(x, t, y, stage), weak(x, t, y, stage), scale, channels)


def _extrapolate(
    good: Float[Array, "b h w c"],
    bad: Float[Array, "b h w c"],
    scale: Float[Array, ""] | float,
    channels: int,
) -> Float[Array, "b h w c"]:
    out = bad + scale * (good - bad)
    if channels:
        out = jnp.concatenate([out[..., :channels], good[..., channels:]], axis=-1)
    return out
