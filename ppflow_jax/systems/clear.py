"""CLEAR (arXiv 2412.16112): every token sees those around it, as a convolution does.

A query at (row, column) of the stage's grid sees the keys with dy^2 + dx^2 < r^2, r tokens of that
stage. Cost grows with the number of tokens and not with its square. With `pool`, it also sees the
keys and values of all cells of pool x pool tokens, each a sum with learned weights.

The same leaves as full attention's, so that a trained model is where it starts; it must be trained
for it (see `systems.mixer_distillation`), and where the circle covers the grid it is full
attention. Queries are computed in tiles: every tile is a dense product with the rectangle of keys
that its circles reach, of which the mask takes the corners away. Shapes are static, and no kernel
is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ppflow_jax.errors import InputError
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import Block, Execution
from ppflow_jax.models.leaves import Key, Leaves
from ppflow_jax.models.parts import FullAttention, Mixer

TILE = 8  # most rows and columns of queries that share a rectangle of keys


@dataclass(frozen=True)
class Clear(Mixer):
    """Attention within a circle.

    Attributes:
      radius: of the circle, in tokens of the stage; 1 is the token itself.
      pool: side of the cells that are seen as one token each; 0 is none.

    Raises:
      InputError: a radius below 1, a pool below 0 or of 1.
    """

    radius: int = 8
    pool: int = 0

    kind = "clear"

    def __post_init__(self):
        if self.radius < 1 or self.pool < 0 or self.pool == 1:
            raise InputError(f"{self}: radius must be at least 1, pool at least 2 or 0 (none)")

    def check(self, model: ModelConfig) -> None:
        for stage in range(len(model.pyramid)):
            rows, cols = model.pyramid.grid(stage, model.latent_size)
            if self.pool and (rows % self.pool or cols % self.pool):
                raise InputError(
                    f"{self}: cells of {self.pool}x{self.pool} tokens do not divide the "
                    f"{cols}x{rows} tokens of stage {stage}: choose a pool that divides those of "
                    "every stage"
                )

    def modules(self, model: ModelConfig, run: Execution, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        modules = super().modules(model, run, rngs)
        if self.pool:
            modules[self.kind] = Cells(self.pool)
        return modules

    def __call__(self, block: Block, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        attention = block.attention
        if not self.pool and covers(block.grid, self.radius):
            return attention(x)
        q, k, v = attention.project(x)
        more = None
        if self.pool:
            weight = block.clear.weight[...].astype(k.dtype)
            more = pooled(weight, k, block.grid), pooled(weight, v, block.grid)
        out = local_attention(q, k, v, block.grid, self.radius, more)
        return block.per_token(attention.out, out.reshape(x.shape))

    def flops(self, model: ModelConfig, stage: int, tokens: int) -> int:
        """8 N D^2 + 4 N K D for K keys of a rectangle and of pooled cells, + 4 N D for these."""
        if tokens == 0:
            return 0
        keys = self.scores(model, stage) // tokens
        return 4 * tokens * model.width * (2 * model.width + keys + (self.pool > 0))

    def scores(self, model: ModelConfig, stage: int) -> int:
        grid = model.pyramid.grid(stage, model.latent_size)
        n = grid[0] * grid[1]
        if not self.pool and covers(grid, self.radius):
            return n * n
        rows, cols = axes(grid, self.radius)
        return n * (rows.keys * cols.keys + (n // self.pool**2 if self.pool else 0))

    def keys(self, layer: int) -> Iterator[Key]:
        if self.pool:
            name = f"blocks.{layer}.attn.spatial_weight"
            shape = (1, 1, 1, self.pool, 1, self.pool, 1)
            path = ("blocks", self.kind, "weight")
            yield Key(name, path, (layer,), np.squeeze, lambda x: x.reshape(shape))

    @classmethod
    def read(cls, state: Any) -> Clear | None:
        """With a pool; without, its names are those of full attention. `radius` (8) is in none."""
        name = "blocks.0.attn.spatial_weight"
        return cls(pool=state[name].shape[3]) if name in state else None

    def start(self, model: ModelConfig, source: ModelConfig, blocks: Leaves, key: Array) -> Leaves:
        """The weights of full attention, or of another radius; cells start as means."""
        before = source.block.mixer
        if not isinstance(before, (FullAttention, Clear)):
            raise InputError(f"{self} starts from full attention, not from {before}")
        if getattr(before, "pool", 0) == self.pool:
            return blocks
        kept = {name: leaf for name, leaf in blocks.items() if name != self.kind}
        if not self.pool:
            return kept
        shape = (model.depth, self.pool, self.pool)
        return kept | {self.kind: {"weight": jnp.full(shape, self.pool**-2.0)}}


class Cells(nnx.Module):
    """The weights by which the tokens of a cell are summed, those of every head and of K and V."""

    def __init__(self, side: int):
        self.weight = nnx.Param(jnp.full((side, side), side**-2.0))


def covers(grid: tuple[int, int], radius: int) -> bool:
    """Whether every token sees all."""
    return (grid[0] - 1) ** 2 + (grid[1] - 1) ** 2 < radius**2


class Axis(NamedTuple):
    """Tiles of queries along one axis of a grid, and the keys that each is computed with.

    Attributes:
      tile, keys: how many of a tile.
      starts: first key of every tile.
      squares: of the distance between query and key [tiles, tile, keys].
    """

    tile: int
    keys: int
    starts: tuple[int, ...]
    squares: Int[np.ndarray, "tiles tile keys"]


def axes(grid: tuple[int, int], radius: int) -> tuple[Axis, Axis]:
    """Rows and columns; one tile is the whole grid where its rectangle of keys would be that."""
    found = [_axis(length, radius, TILE) for length in grid]
    if all(a.keys == length for a, length in zip(found, grid)):
        found = [_axis(length, radius, length) for length in grid]
    return found[0], found[1]


def _axis(length: int, radius: int, most: int) -> Axis:
    tile = max(d for d in range(1, most + 1) if length % d == 0)
    keys = min(tile + 2 * (radius - 1), length)
    first = np.arange(0, length, tile)
    starts = np.clip(first - (radius - 1), 0, length - keys)
    queries = first[:, None] + np.arange(tile)
    seen = starts[:, None] + np.arange(keys)
    squares = (queries[:, :, None] - seen[:, None]) ** 2
    return Axis(tile, keys, tuple(map(int, starts)), squares)


def local_attention(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b n h e"],
    v: Float[Array, "b n h e"],
    grid: tuple[int, int],
    radius: int,
    more: tuple[Float[Array, "b m h e"], Float[Array, "b m h e"]] | None = None,
) -> Float[Array, "b n h e"]:
    """softmax(q k^T / sqrt(e)) v over the keys in the circle and those in `more`, seen by all.

    In the dtype of q, with float32 softmax.
    """
    rows, cols = axes(grid, radius)
    size, heads, width = q.shape[0], *q.shape[2:]
    tiles = (size, len(rows.starts), rows.tile, len(cols.starts), cols.tile, heads, width)
    q = (q * width**-0.5).reshape(tiles)
    k, v = (_rectangles(a.reshape(size, *grid, heads, width), rows, cols) for a in (k, v))

    def product(pattern: str, *operands: Array) -> Array:
        return jnp.einsum(pattern, *operands, preferred_element_type=jnp.float32)

    scores = product("biyjxhe,biujwhe->bhijyxuw", q, k)
    squares = (
        jnp.asarray(rows.squares)[:, None, :, None, :, None]
        + jnp.asarray(cols.squares)[None, :, None, :, None, :]
    )
    scores = jnp.where(squares[None, None] < radius**2, scores, -jnp.inf)
    top = jnp.max(scores, axis=(-2, -1))
    if more is not None:
        far = product("biyjxhe,bmhe->bhijyxm", q, more[0])
        top = jnp.maximum(top, jnp.max(far, axis=-1))
    top = jax.lax.stop_gradient(top)
    # The division by the sum comes last, where there is less to divide
    p = jnp.exp(scores - top[..., None, None])
    total = jnp.sum(p, axis=(-2, -1))
    out = product("bhijyxuw,biujwhe->biyjxhe", p.astype(v.dtype), v)
    if more is not None:
        p = jnp.exp(far - top[..., None])
        total = total + jnp.sum(p, axis=-1)
        out = out + product("bhijyxm,bmhe->biyjxhe", p.astype(v.dtype), more[1])
    out = out / jnp.einsum("bhijyx->biyjxh", total)[..., None]
    return out.astype(q.dtype).reshape(size, grid[0] * grid[1], heads, width)


def _rectangles(
    x: Float[Array, "b r c h e"], rows: Axis, cols: Axis
) -> Float[Array, "b i u j w h e"]:
    """The keys of every tile."""
    for place, axis in ((1, rows), (3, cols)):
        cut = [jax.lax.slice_in_dim(x, s, s + axis.keys, axis=place) for s in axis.starts]
        x = jnp.stack(cut, axis=place)
    return x


def pooled(
    weight: Float[Array, "f f"], x: Float[Array, "b n h e"], grid: tuple[int, int]
) -> Float[Array, "b m h e"]:
    """The sum over every cell of the grid with these weights, row by row of cells."""
    side = len(weight)
    cells = (grid[0] // side, side, grid[1] // side, side)
    out = jnp.einsum("brfcghe,fg->brche", x.reshape(len(x), *cells, *x.shape[2:]), weight)
    return out.reshape(len(x), -1, *x.shape[2:])
