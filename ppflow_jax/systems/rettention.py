"""Sparse attention with what it lacks kept from a full step (Re-ttention, arXiv 2505.22918).

At a cheap step a query sees the keys within `width` places of its own, in raster order. The softmax
over them is scaled by rho, their share of the full softmax when that was last computed, and what
came from the other keys then is added. In formulas, with p the full softmax of a query and M its
band: rho = sum_M p, kept = sum_{not M} p v; a cheap step gives (rho + drift) softmax_M v + kept.
A cheap step right after a full one with the same tokens gives the full output.

What the authors' code (cccrrrccc/Re-ttention) does and this does not:
  * its rho grows by 0.04 a step without bound, past 1, where the band has more than the whole;
  * it keeps what is missing after the output projection, which is linear: here before it, which
    needs no second projection;
  * its cheap steps compute all scores and mask them; here only those of the band and of whole
    blocks around it, so that they are cheaper;
  * the steps that are full (the first five, and numbers 5, 10 and 15) are written into it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ppflow_jax.errors import InputError
from ppflow_jax.flow.method import Evaluation, either
from ppflow_jax.flow.plan import Segment
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.layers import Block
from ppflow_jax.systems.attention_branch import projected, with_attention
from ppflow_jax.systems.composition import Made, in_stages
from ppflow_jax.systems.forecast_schedule import full_steps

# Of every query: rho [.., n, heads], and the output of the keys outside its band [.., n, heads, e]
Kept = tuple[Float[Array, "... n h"], Float[Array, "... n h e"]]


@dataclass(frozen=True)
class RettentionConfig:
    """When attention is sparse, and how sparse.

    Attributes:
      rettention: share of the keys that a query sees at a cheap step, with its own: those within
        int(share n) // 2 places among n tokens. 1 is off.
      drift: what rho grows by from one cheap step to the next, up to 1.
      warmup: full steps at the start of a stage.
      interval: after them every so many steps one is full.
      rettention_stages: the stages with cheap steps, 0 the coarsest; by default the finest alone.

    Raises:
      InputError: a value out of its range.
    """

    rettention: float = 0.25
    drift: float = 0.04
    warmup: int = 6
    interval: int = 5
    rettention_stages: tuple[int, ...] = ()

    def __post_init__(self):
        if not 0 < self.rettention <= 1 or not 0 <= self.drift <= 1:
            raise InputError(
                f"rettention {self.rettention} must be in (0, 1] and its drift {self.drift} in "
                "[0, 1]"
            )
        if self.warmup < 1 or self.interval < 1:
            raise InputError(
                f"rettention warmup {self.warmup} and interval {self.interval} must be at least 1"
            )


def half_width(tokens: int, share: float) -> int:
    """How many places to either side a query sees."""
    return int(tokens * share) // 2


def in_band(tokens: int, half: int) -> Bool[np.ndarray, "n n"]:
    """Which keys (columns) each query (row) sees at a cheap step."""
    i = np.arange(tokens)
    return np.abs(i[:, None] - i[None]) <= half


def full_attention(
    q: Float[Array, "b n h e"], k: Float[Array, "b n h e"], v: Float[Array, "b n h e"], half: int
) -> tuple[Float[Array, "b n h e"], Kept]:
    """Attention, and what a cheap step takes from it; float32 softmax."""
    scores = jnp.einsum("bqhe,bkhe->bhqk", _scaled(q), k, preferred_element_type=jnp.float32)
    p, band = jax.nn.softmax(scores, axis=-1), jnp.asarray(in_band(q.shape[1], half))
    inside, outside = (jnp.where(seen, p, 0) for seen in (band, ~band))
    both = [_values(part, v) for part in (inside, outside)]
    rho = jnp.swapaxes(jnp.sum(inside, axis=-1), 1, 2)
    return both[0] + both[1], (rho, both[1])


def band_attention(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b n h e"],
    v: Float[Array, "b n h e"],
    half: int,
    rho: Float[Array, "b n h"],
    outside: Float[Array, "b n h e"],
) -> Float[Array, "b n h e"]:
    """rho softmax(scores in the band) v + outside, from the scores of blocks of keys."""
    n, size = q.shape[1], _block(q.shape[1], half)
    keys, seen = _windows(n, half, size)
    blocks = -(-n // size)
    padded = jnp.pad(_scaled(q), ((0, 0), (0, blocks * size - n), (0, 0), (0, 0)))
    queries = padded.reshape(len(q), blocks, size, *q.shape[2:])
    scores = jnp.einsum(
        "bcqhe,bckhe->bchqk", queries, k[:, keys], preferred_element_type=jnp.float32
    )
    p = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum(
        "bchqk,bckhe->bcqhe", p.astype(v.dtype), v[:, keys], preferred_element_type=jnp.float32
    )
    out = out.reshape(len(q), blocks * size, *q.shape[2:])[:, :n]
    return (rho[..., None] * out + outside).astype(v.dtype)


def _scaled(q: Float[Array, "b n h e"]) -> Float[Array, "b n h e"]:
    return q * q.shape[-1] ** -0.5


def _values(p: Float[Array, "b h q k"], v: Float[Array, "b k h e"]) -> Float[Array, "b q h e"]:
    return jnp.einsum("bhqk,bkhe->bqhe", p.astype(v.dtype), v)


def _block(tokens: int, half: int) -> int:
    """Queries in a block: as many as they see to one side, within reason."""
    return min(max(half, 16), tokens)


def _windows(
    tokens: int, half: int, size: int
) -> tuple[np.ndarray, Bool[np.ndarray, "blocks size keys"]]:
    """The keys that a block of `size` queries may see, and which of them each query sees.

    Queries beyond the last token see what the last one does.
    """
    starts = np.arange(0, tokens, size)
    width = min(size + 2 * half, tokens)
    first = np.clip(starts - half, 0, tokens - width)
    keys = first[:, None] + np.arange(width)[None]
    queries = np.minimum(starts[:, None] + np.arange(size)[None], tokens - 1)
    return keys, np.abs(queries[:, :, None] - keys[:, None]) <= half


@dataclass(frozen=True)
class Rettention:
    """The method of a segment (see `flow.method.Method`).

    Its memory is what `full_attention` gives for every block, a step's input how much rho has grown
    since the last full step.

    Attributes:
      half: `half_width`.
    """

    half: int
    name: str = "sparse"
    level: str = "network"

    def memory(self, evaluation: Evaluation) -> Kept:
        def trunk(blocks: Block, h: Float[Array, "b n d"], c: Float[Array, "b d"]):
            depth, _, _, *heads = blocks.attention.qkv_kernel.shape
            rho = jnp.zeros((depth, *h.shape[:2], heads[0]), jnp.float32)
            shape = depth, *h.shape[:2], *heads
            return h, (rho, jnp.zeros(shape, blocks.attention.dtype))

        return evaluation.call(trunk=trunk)[1]

    def evaluate(self, evaluation: Evaluation, memory: Kept) -> tuple[Array, Kept]:
        call, inputs, full = evaluation
        return call(trunk=partial(self.trunk, memory, inputs["drift"], full))

    def trunk(
        self,
        memory: Kept,
        drift: Float[Array, ""],
        full: Bool[Array, ""] | bool,
        blocks: Block,
        h: Float[Array, "b n d"],
        c: Float[Array, "b d"],
    ) -> tuple[Float[Array, "b n d"], Kept]:
        """The blocks with full attention, which is kept, or with sparse one; and the memory."""

        def record(h, memory):
            def body(carry, layer):
                (h, memory), (block, i) = carry, layer
                h, new = self._full(block, h, c)
                put = jax.lax.dynamic_update_index_in_dim
                memory = tuple(put(a, b.astype(a.dtype), i, 0) for a, b in zip(memory, new))
                return (h, memory), None

            layers = np.arange(len(memory[0]), dtype=np.uint32)
            return jax.lax.scan(body, (h, memory), (blocks, layers))[0]

        def reuse(h, memory):
            rho = jnp.minimum(memory[0] + drift, 1)
            body = lambda h, layer: (self._sparse(layer[0], h, c, *layer[1:]), None)
            return jax.lax.scan(body, h, (blocks, rho, memory[1]))[0]

        return either(full, record, reuse, h, memory)

    def _full(self, block: Block, h: Array, c: Array) -> tuple[Array, Kept]:
        found = []

        def attention(x):
            out, kept = full_attention(*block.attention.project(x), self.half)
            found.append(kept)
            return projected(block.attention, out)

        return with_attention(block, h, c, attention), found[0]

    def _sparse(self, block: Block, h: Array, c: Array, rho: Array, outside: Array) -> Array:
        def attention(x):
            q, k, v = block.attention.project(x)
            return projected(block.attention, band_attention(q, k, v, self.half, rho, outside))

        return with_attention(block, h, c, attention)

    def flops(self, model: ModelConfig, stage: int, full: bool, inputs: Any) -> int:
        """A full step has the products of weights and values twice, in the band and outside it."""
        rows, cols = model.pyramid.grid(stage, model.latent_size)
        n, d = rows * cols, model.width
        plain = forward_flops(model, stage)
        if full:
            return plain + model.blocks_at(stage) * 2 * n * n * d
        size = _block(n, self.half)
        scores = -(-n // size) * size * min(size + 2 * self.half, n)
        return plain - model.blocks_at(stage) * 4 * d * (n * n - scores)


def sparse(
    segments: Iterable[Segment], model: ModelConfig, config: RettentionConfig
) -> list[Segment]:
    """The plan with cheap steps in the stages of `config`.

    Raises:
      InputError: see `composition.in_stages`.
    """

    def make(stage: int, steps: int) -> Made:
        rows, cols = model.pyramid.grid(stage, model.latent_size)
        half = half_width(rows * cols, config.rettention)
        full = full_steps("taylor", steps, config.interval, config.warmup, 0.0)
        if full.all() or config.rettention == 1:
            return None
        i = np.arange(steps)
        since = i - np.maximum.accumulate(np.where(full, i, 0))
        drift = config.drift * np.maximum(since - 1, 0)
        return Rettention(half), full, {"drift": np.float32(drift)}

    return in_stages(segments, model, "rettention", config.rettention_stages, make)
