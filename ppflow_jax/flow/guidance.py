"""Classifier-free guidance (arXiv 2207.12598) and autoguidance (arXiv 2406.02507)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ppflow_jax.models.conditions import Cond, Condition, null

# (x, t, y) -> prediction with the shape of x
Predict = Callable[[Array, Array, Cond], Array]


@dataclass(frozen=True)
class Cfg:
    """u + scale (c - u), c with the label and u with the null class, from one doubled batch.

    Conditions that training drops are not given to u either, the others are.

    A scale of 1 is c: callers who know it beforehand call the network and save half.

    Attributes:
      channels: 0 guides all; n > 0 only the first n, the others keep c (the PyTorch code guides
        3 of 4).
      conditions: of the model.
    """

    null_label: int
    channels: int = 0
    conditions: tuple[Condition, ...] = ()

    def __call__(
        self,
        predict: Predict,
        weak: Predict | None,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        y: Cond,
        scale: Float[Array, ""] | float,
    ) -> Float[Array, "b h w c"]:
        def pairs(first: Array, second: Array) -> Array:
            # The two halves of an image are neighbours: a batch split over devices stays put.
            return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])

        xs, ts = pairs(x, x), pairs(t, t)
        ys = jax.tree.map(pairs, y, null(self.conditions, self.null_label, y))
        both = predict(xs, ts, ys)
        return extrapolate(both[0::2], both[1::2], scale, self.channels)


@dataclass(frozen=True)
class Auto:
    """w + scale (c - w), w by a weaker network that sees the same labels; no null class."""

    channels: int = 0

    def __call__(
        self,
        predict: Predict,
        weak: Predict,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        y: Cond,
        scale: Float[Array, ""] | float,
    ) -> Float[Array, "b h w c"]:
        return extrapolate(predict(x, t, y), weak(x, t, y), scale, self.channels)


Guidance = Cfg | Auto


def extrapolate(
    good: Float[Array, "b h w c"],
    bad: Float[Array, "b h w c"],
    scale: Float[Array, ""] | Float[Array, "b 1 1 1"] | float,
    channels: int,
) -> Float[Array, "b h w c"]:
    """bad + scale (good - bad), of all channels (0) or the first; of the others `good`."""
    out = bad + scale * (good - bad)
    if channels:
        out = jnp.concatenate([out[..., :channels], good[..., channels:]], axis=-1)
    return out
