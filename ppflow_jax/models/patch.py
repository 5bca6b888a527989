"""Patchify, its inverse, and the fixed positions of a token grid."""

from __future__ import annotations

import einops
import numpy as np
from jaxtyping import Array, Float

from ppflow_jax.pyramid import Pyramid


def patchify(x: Float[Array, "b h w c"], patch: tuple[int, int]) -> Float[Array, "b n d"]:
    """Cut a latent into patches: tokens row-major, features ordered (row, column, channel)."""
    return einops.rearrange(x, "b (r p) (s q) c -> b (r s) (p q c)", p=patch[0], q=patch[1])


def unpatchify(
    tokens: Float[Array, "b n d"], grid: tuple[int, int], patch: tuple[int, int]
) -> Float[Array, "b h w c"]:
    """Inverse of `patchify`."""
    return einops.rearrange(
        tokens,
        "b (r s) (p q c) -> b (r p) (s q) c",
        r=grid[0],
        s=grid[1],
        p=patch[0],
        q=patch[1],
    )


def _sincos(positions: np.ndarray, width: int) -> np.ndarray:
    omega = 10000.0 ** -(np.arange(width // 2) / (width / 2))
    angles = np.outer(positions, omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def positions(pyramid: Pyramid, stage: int, latent_size: int, width: int) -> np.ndarray:
    """Fixed sin-cos position embedding of one stage, float32 [tokens, width].

    Coordinates are the top-left corner of each token, in units of the pyramid's smallest
    patch, so that a coarse token stands where its first fine token would. The first half of
    the features encodes the column, the second half the row (as in MAE and DiT).
    """
    rows, cols = pyramid.grid(stage, latent_size)
    unit_h, unit_w = (min(s.patch[axis] for s in pyramid.stages) for axis in (0, 1))
    patch_h, patch_w = pyramid.stages[stage].patch
    col, row = np.meshgrid(
        np.arange(cols) * (patch_w / unit_w), np.arange(rows) * (patch_h / unit_h)
    )
    halves = [_sincos(axis.ravel(), width // 2) for axis in (col, row)]
    return np.concatenate(halves, axis=1).astype(np.float32)
