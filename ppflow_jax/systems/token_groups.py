"""Which tokens are merged, how, and how every token gets its value back.

All sizes are static and every row of a batch is matched on its own: sorting and gathering only.
Sources: SDTM (arXiv 2505.11707) and its released code, which is attention-free and differs from
the paper; ToMe for diffusion (arXiv 2303.17604).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from ppflow_jax.errors import InputError

_HIGHEST = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """A partition of the n tokens of every sample into g groups and tokens that stay alone.

    Attributes:
      order: the tokens: those that begin a group, those that join one, those that stay alone. Of
        windows: those of the first window, of the second, ..., those that stay alone.
      row: of the shorter sequence, for each token; the groups are the first rows.
      target: the group that each joining token joins; None for windows.
      count: g.
    """

    order: Int[Array, "b n"]
    row: Int[Array, "b n"]
    target: Int[Array, "b s"] | None
    count: int = field(metadata={"static": True})

    @property
    def alone(self) -> Bool[Array, "b n"]:
        """Whether each token stays alone."""
        return self.row >= self.count


def _along(x: Array, index: Int[Array, "b ..."], axis: int) -> Array:
    """`jnp.take_along_axis`, without its test for indices that are out of bounds."""
    return jnp.take_along_axis(x, index, axis, mode="promise_in_bounds")


def inverse(order: Int[Array, "b n"], values: Int[Array, "b n"]) -> Int[Array, "b n"]:
    """The value of every token, from the values in this order of tokens."""
    return jax.lax.sort((order, values), dimension=1, num_keys=1)[1]


def take(x: Float[Array, "b n d"], tokens: Int[Array, "b m"]) -> Float[Array, "b m d"]:
    """Rows of `x`, chosen for each sample."""
    return _along(x, tokens[:, :, None], 1)


def sizes(groups: Groups) -> Float[Array, "b m"]:
    """How many tokens are in each row."""
    b, n = groups.row.shape
    if groups.target is None:
        size = np.ones(n - 3 * groups.count, np.float32)
        size[: groups.count] = 4
        return jnp.broadcast_to(size, (b, len(size)))
    joined = jax.nn.one_hot(groups.target, groups.count).sum(axis=1)
    alone = n - groups.count - groups.target.shape[1]
    return jnp.concatenate([1 + joined, jnp.ones((b, alone))], axis=1)


def merge(groups: Groups, x: Float[Array, "b n d"]) -> Float[Array, "b m d"]:
    """The shorter sequence: the mean of every group, then tokens that stay alone (float32)."""
    g, x = groups.count, take(x, groups.order)  # one gather compiles faster than three
    if groups.target is None:
        windows, alone = jnp.split(x, (4 * g,), axis=1)
        mean = sum_of_four(windows.reshape(len(x), g, 4, x.shape[2])) / 4
    else:
        into, sources, alone = jnp.split(x, (g, g + groups.target.shape[1]), axis=1)
        joins = jax.nn.one_hot(groups.target, g)
        total = into + jnp.einsum("bsg,bsd->bgd", joins, sources, precision=_HIGHEST)
        mean = total / (1 + joins.sum(axis=1))[:, :, None]
    return jnp.concatenate([mean, alone], axis=1)


def unmerge(groups: Groups, x: Float[Array, "b m d"]) -> Float[Array, "b n d"]:
    """Every token gets a copy of its row."""
    return take(x, groups.row)


def mix(
    groups: Groups, new: Float[Array, "b n d"], stored: Float[Array, "b n d"], weight: float
) -> Float[Array, "b n d"]:
    """weight * new + (1 - weight) * stored for every token that is not alone."""
    return jnp.where(groups.alone[:, :, None], new, weight * new + (1 - weight) * stored)


def count_up(groups: Groups, counter: Int[Array, "b n"]) -> Int[Array, "b n"]:
    """For how many merges in a row each token has not been alone."""
    return jnp.where(groups.alone, 0, counter + 1)


def cells(grid: tuple[int, int], cell: tuple[int, int]) -> Int[np.ndarray, "w k"]:
    """Tokens of each cell of a token grid (rows, columns), both in raster order.

    Rows and columns that are left over at the end belong to no cell.
    """
    tokens = np.arange(grid[0] * grid[1]).reshape(grid)
    high, wide = grid[0] // cell[0], grid[1] // cell[1]
    tokens = tokens[: high * cell[0], : wide * cell[1]].reshape(high, cell[0], wide, cell[1])
    return tokens.transpose(0, 2, 1, 3).reshape(high * wide, cell[0] * cell[1])


def windows(grid: tuple[int, int]) -> Int[np.ndarray, "w 4"]:
    """`cells` of 2x2 tokens.

    Raises:
      InputError: they do not tile the grid.
    """
    if grid[0] % 2 or grid[1] % 2:
        raise InputError(
            f"windows of 2x2 tokens do not tile a grid of {grid[0]}x{grid[1]} tokens: "
            "choose another stage, or merge=tome"
        )
    return cells(grid, (2, 2))


def in_windows(x: Shaped[Array, "b n ..."], grid: tuple[int, int]) -> Shaped[Array, "b w 4 ..."]:
    """The tokens of every window, in the order of `windows`."""
    (rows, columns), inner = grid, x.shape[2:]
    x = x.reshape(len(x), rows // 2, 2, columns // 2, 2, *inner)
    return jnp.swapaxes(x, 2, 3).reshape(len(x), rows * columns // 4, 4, *inner)


def sum_of_four(x: Shaped[Array, "b w 4 ..."]) -> Shaped[Array, "b w ..."]:
    """Sum over the tokens of a window. Additions can be fused where a reduction may not be."""
    return x[:, :, 0] + x[:, :, 1] + x[:, :, 2] + x[:, :, 3]


def unit(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Vectors of length 1, in float32; zero stays zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def similarity(x: Float[Array, "b n d"], grid: tuple[int, int]) -> Float[Array, "b w"]:
    """Mean of the 16 cosines within each window, those of a token with itself included."""
    return jnp.sum(jnp.square(jnp.mean(in_windows(unit(x), grid), axis=2)), axis=-1)


def window_scores(
    x: Float[Array, "b n d"], counter: Int[Array, "b n"], grid: tuple[int, int], frequency: float
) -> Float[Array, "b w"]:
    """`similarity` + frequency * (mean of the counter in the window / its mean over all tokens).

    A counter of zeros adds nothing. A positive `frequency` prefers windows that have been merged
    before, as the released code does; a negative one those that have not.
    """
    mean = jnp.sum(counter, axis=1, keepdims=True) / counter.shape[1]
    relative = sum_of_four(in_windows(counter, grid)) / 4 / (mean + 1e-6)
    return similarity(x, grid) + frequency * relative


def best(scores: Float[Array, "b w"]) -> Int[Array, "b w"]:
    """Indices from the highest score to the lowest, the first one first among equals."""
    return jnp.argsort(-scores, axis=1, stable=True)


def merge_windows(scores: Float[Array, "b w"], grid: tuple[int, int], count: int) -> Groups:
    """Groups of SDTM's structure stage: each of the `count` best windows becomes one row."""
    order = jnp.asarray(windows(grid))[best(scores)].reshape(len(scores), -1)
    i = inverse(order, jax.lax.broadcasted_iota(jnp.int32, order.shape, 1))
    row = jnp.where(i < 4 * count, i // 4, i - 3 * count)
    return Groups(order, row, None, count)


def oldest(counter: Int[Array, "b n"], grid: tuple[int, int]) -> Int[Array, "b w"]:
    """Where in every window the destination of SDTM's detail stage is; the others are sources.

    It is the token with the highest counter, the first one among equals.
    """
    return jnp.argmax(in_windows(counter, grid), axis=2)


def by_cell(table: Int[np.ndarray, "w k"], n: int) -> Int[np.ndarray, " n"]:
    """All n tokens, cell by cell; then those in no cell."""
    return np.concatenate([table.ravel(), np.setdiff1d(np.arange(n), table)]).astype(np.int32)


def nearest(
    x: Float[Array, "b n d"], position: Int[Array, "b w"], table: Int[np.ndarray, "w k"]
) -> tuple[Float[Array, "b n"], Int[Array, "b n"]]:
    """Of every token: the cosine to the most similar destination, and the cell of that one.

    A destination has the score inf.

    Args:
      x: tokens in the order of `by_cell`, as are the results.
      position: of the destination in every cell.
      table: the cells.
    """
    (w, k), x = table.shape, unit(x)
    into = _along(x[:, : w * k].reshape(-1, w, k, x.shape[2]), position[:, :, None, None], 2)
    cosines = jnp.einsum("bnd,bgd->bng", x, into[:, :, 0], precision=_HIGHEST)
    chosen = (position[:, :, None] == np.arange(k)[None, None]).reshape(-1, w * k)
    chosen = jnp.pad(chosen, ((0, 0), (0, x.shape[1] - w * k)))
    return jnp.where(chosen, jnp.inf, jnp.max(cosines, axis=2)), jnp.argmax(cosines, axis=2)


def merge_nearest(
    x: Float[Array, "b n d"], position: Int[Array, "b w"], table: Int[np.ndarray, "w k"], count: int
) -> Groups:
    """The `count` tokens most similar to any destination join the one most similar to them.

    Args:
      x, position, table: as in `nearest`.
      count: at most the number of tokens that are no destinations.
    """
    score, target = nearest(x, position, table)
    tokens = jnp.broadcast_to(by_cell(table, x.shape[1]), score.shape)
    # Destinations first, then in the order of `best`
    _, order, target = jax.lax.sort((-score, tokens, target), dimension=1, num_keys=1)
    g, i = len(table), np.arange(x.shape[1], dtype=np.int32)[None]
    row = jnp.where(i < g, i, jnp.where(i < g + count, target, i - count))
    return Groups(order, inverse(order, row), target[:, g : g + count], g)
