"""Which tokens are merged, how, and how every token gets its value back.

All sizes are static and every row of a batch is matched on its own: sorting and gathering only.
Sources: SDTM (arXiv 2505.11707) and its released code, which is attention-free and differs from
the paper; ToMe for diffusion (arXiv 2303.17604).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ppflow_jax.errors import InputError

_HIGHEST = jax.lax.Precision.HIGHEST


class Groups(NamedTuple):
    """A partition of the n tokens of every row into g + k rows of a shorter sequence.

    Attributes:
      into: tokens that begin a group, one row each; their rows come first.
      others: all others, first the s tokens that join a group, then the k that stay alone.
      target: the group, 0 to g - 1, that each joining token joins.
      row: the row that each token is in.
    """

    into: Int[Array, "b g"]
    others: Int[Array, "b o"]
    target: Int[Array, "b s"]
    row: Int[Array, "b n"]

    @property
    def alone(self) -> Bool[Array, "b n"]:
        """Whether each token stays alone."""
        return self.row >= self.into.shape[1]


def _along(x: Array, index: Int[Array, "b ..."], axis: int) -> Array:
    """`jnp.take_along_axis`, without its test for indices that are out of bounds."""
    return jnp.take_along_axis(x, index, axis, mode="promise_in_bounds")


def grouped(
    into: Int[Array, "b g"], others: Int[Array, "b o"], target: Int[Array, "b o"], count: int
) -> Groups:
    """`Groups` in which the first `count` of the others join their target; the rest stay alone."""
    g, i = into.shape[1], np.arange(others.shape[1], dtype=np.int32)
    own = np.broadcast_to(np.arange(g, dtype=np.int32), into.shape)
    rows = jnp.concatenate([own, jnp.where(i < count, target, g - count + i)], axis=1)
    tokens = jnp.concatenate([into, others], axis=1)
    _, row = jax.lax.sort((tokens, rows), dimension=1, num_keys=1)
    return Groups(into, others, target[:, :count], row)


def take(x: Float[Array, "b n d"], tokens: Int[Array, "b m"]) -> Float[Array, "b m d"]:
    """Rows of `x`, chosen for each sample."""
    return _along(x, tokens[:, :, None], 1)


def sizes(groups: Groups) -> Float[Array, "b m"]:
    """How many tokens are in each row."""
    joined = jax.nn.one_hot(groups.target, groups.into.shape[1]).sum(axis=1)
    alone = groups.others.shape[1] - groups.target.shape[1]
    return jnp.concatenate([1 + joined, jnp.ones((len(joined), alone))], axis=1)


def merge(groups: Groups, x: Float[Array, "b n d"]) -> Float[Array, "b m d"]:
    """The shorter sequence: the mean of every group, then tokens that stay alone (float32)."""
    g, s = groups.into.shape[1], groups.target.shape[1]
    # One gather, which compiles faster than three
    x = take(x, jnp.concatenate([groups.into, groups.others], axis=1))
    into, sources, alone = jnp.split(x, (g, g + s), axis=1)
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


def unit(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Vectors of length 1, in float32; zero stays zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def similarity(x: Float[Array, "b n d"], table: Int[np.ndarray, "w k"]) -> Float[Array, "b w"]:
    """Mean of the k^2 cosines within each window, those of a token with itself included."""
    return jnp.sum(jnp.square(jnp.mean(unit(x)[:, table], axis=2)), axis=-1)


def window_scores(
    x: Float[Array, "b n d"],
    counter: Int[Array, "b n"],
    table: Int[np.ndarray, "w k"],
    frequency: float,
) -> Float[Array, "b w"]:
    """`similarity` + frequency * (mean of the counter in the window / its mean over all tokens).

    A counter of zeros adds nothing. A positive `frequency` prefers windows that have been merged
    before, as the released code does; a negative one those that have not.
    """
    mean = jnp.sum(counter, axis=1, keepdims=True) / counter.shape[1]
    relative = jnp.sum(counter[:, table], axis=2) / table.shape[1] / (mean + 1e-6)
    return similarity(x, table) + frequency * relative


def best(scores: Float[Array, "b w"]) -> Int[Array, "b w"]:
    """Indices from the highest score to the lowest, the first one first among equals."""
    return jnp.argsort(-scores, axis=1, stable=True)


def merge_windows(scores: Float[Array, "b w"], table: Int[np.ndarray, "w k"], count: int) -> Groups:
    """Groups of SDTM's structure stage: each of the `count` best windows becomes one row."""
    tokens = jnp.asarray(table)[best(scores)]
    b, merged = len(tokens), tokens[:, :count]
    others = [merged[:, :, 1:].reshape(b, -1), tokens[:, count:].reshape(b, -1)]
    joined, others = others[0].shape[1], jnp.concatenate(others, axis=1)
    target = np.arange(others.shape[1], dtype=np.int32) // (table.shape[1] - 1)
    return grouped(merged[:, :, 0], others, jnp.broadcast_to(target, others.shape), joined)


def oldest(
    counter: Int[Array, "b n"], table: Int[np.ndarray, "w k"]
) -> tuple[Int[Array, "b w"], Int[Array, "b s"]]:
    """Destinations of SDTM's detail stage, and all other tokens, which are its sources.

    The destination of a window is the token with the highest counter, the first one among equals.
    """
    position = jnp.argmax(counter[:, table], axis=2)
    return split(position, table)


def split(
    position: Int[Array, "b w"], table: Int[np.ndarray, "w k"]
) -> tuple[Int[Array, "b w"], Int[Array, "b s"]]:
    """The token at a position of every cell, and the other tokens of the cells."""
    b, k = len(position), table.shape[1]
    tokens = jnp.broadcast_to(jnp.asarray(table), (b, *table.shape))
    order = (position[:, :, None] + jnp.arange(k)[None, None]) % k
    tokens = _along(tokens, order, 2)
    return tokens[:, :, 0], tokens[:, :, 1:].reshape(b, -1)


def nearest(
    x: Float[Array, "b n d"], into: Int[Array, "b g"], sources: Int[Array, "b s"]
) -> tuple[Float[Array, "b s"], Int[Array, "b s"]]:
    """Of every source: the cosine to the most similar destination, and which one it is."""
    x = take(unit(x), jnp.concatenate([into, sources], axis=1))
    into, sources = jnp.split(x, (into.shape[1],), axis=1)
    cosines = jnp.einsum("bsd,bgd->bsg", sources, into, precision=_HIGHEST)
    return jnp.max(cosines, axis=2), jnp.argmax(cosines, axis=2)


def merge_nearest(
    x: Float[Array, "b n d"], into: Int[Array, "b g"], sources: Int[Array, "b s"], count: int
) -> Groups:
    """The `count` sources most similar to any destination join the one most similar to them."""
    score, target = nearest(x, into, sources)
    # In the order of `best`
    _, sources, target = jax.lax.sort((-score, sources, target), dimension=1, num_keys=1)
    return grouped(into, sources, target, count)
