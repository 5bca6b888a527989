"""Token merging for diffusion (ToMe, arXiv 2303.17604), in the place of SDTM: the ablation.

One random token of every 2x2 cell is a destination, the same for the whole batch; the sources
most similar to any destination join it. No counters, no stored values, no stages.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ppflow_jax.systems.token_groups import Groups, by_cell, cells, merge_nearest


def draws(
    steps: int, grid: tuple[int, int], cell: tuple[int, int] = (2, 2), seed: int = 0
) -> Int[np.ndarray, "k w"]:
    """Position of the destination in every cell, at every step."""
    shape = (steps, len(cells(grid, cell)))
    return np.random.default_rng(seed).integers(cell[0] * cell[1], size=shape, dtype=np.int32)


def match(
    x: Float[Array, "b n d"],
    position: Int[Array, " w"],
    grid: tuple[int, int],
    count: int,
    cell: tuple[int, int] = (2, 2),
) -> Groups:
    """Groups after `count` sources, or as many as there are, have joined destinations.

    Args:
      x: tokens that decide; the original takes what enters the block.
      position: of the destination in every cell, one draw for the batch.
      grid: rows and columns of tokens; those left over by the cells are sources.
    """
    table, n = cells(grid, cell), x.shape[1]
    position = jnp.broadcast_to(position, (len(x), len(table)))
    return merge_nearest(x[:, by_cell(table, n)], position, table, min(count, n - len(table)))
