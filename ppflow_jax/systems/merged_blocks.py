"""Blocks on merged tokens: how one step of token merging is computed (see `merge` for which)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ppflow_jax.flow.method import Evaluation, either
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import block_flops, ends_flops
from ppflow_jax.models.layers import Block
from ppflow_jax.systems import token_groups, tome


class Parts(NamedTuple):
    """A block taken apart: what enters each branch, and each branch with its gate.

    The attention branch takes the number of members of each token, or None.
    """

    before_attention: Callable[[Array], Array]
    attention: Callable[[Array, Array | None], Array]
    before_mlp: Callable[[Array], Array]
    mlp: Callable[[Array], Array]


def parts(block: Block, c: Float[Array, "b d"]) -> Parts:
    """A block of the network; `c` is already SiLU(c)."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)
    return Parts(
        lambda h: block.modulated(0, h, shift1, scale1),
        lambda x, members: gate1[:, None] * block.attention(x, members),
        lambda h: block.modulated(1, h, shift2, scale2),
        lambda x: gate2[:, None] * block.mlp(x),
    )


def full_layer(layer: Parts, h: Float[Array, "b n d"]) -> tuple[Array, tuple[Array, Array]]:
    """The block's output, and its two gated branches."""
    attention = layer.attention(layer.before_attention(h), None)
    h = h + attention
    mlp = layer.mlp(layer.before_mlp(h))
    return h + mlp, (attention, mlp)


@dataclass(frozen=True)
class Merging:
    """One way to merge: a kind and a static count.

    Attributes:
      kind: `windows`, for attention and MLP; `tokens`, for the MLP; `tome`, for attention; or
        `nothing`, where the ratio leaves nothing to merge.
      count: windows, or tokens merged away.
      grid: rows and columns of tokens.
      frequency, mixing, proportional: of `MergeConfig`.
    """

    kind: str
    count: int
    grid: tuple[int, int]
    frequency: float = 0.05
    mixing: float = 0.1
    proportional: bool = False

    def groups(
        self,
        h: Float[Array, "b n d"],
        x: Float[Array, "b n d"],
        counter: Int[Array, "b n"],
        position: Int[Array, " w"] | None,
    ) -> token_groups.Groups:
        """What is merged in a block that `h` enters, `x` its attention."""
        if self.kind == "tome":
            return tome.match(h, position, self.grid, self.count)
        if self.kind == "windows":
            scores = token_groups.window_scores(x, counter, self.grid, self.frequency)
            return token_groups.merge_windows(scores, self.grid, self.count)
        oldest = token_groups.oldest(counter, self.grid)
        x = token_groups.in_windows(x, self.grid).reshape(x.shape)
        return token_groups.merge_nearest(x, oldest, token_groups.windows(self.grid), self.count)

    def layer(
        self,
        layer: Parts,
        h: Float[Array, "b n d"],
        counter: Int[Array, "b n"],
        stored: tuple[Array, Array] | None,
        position: Int[Array, " w"] | None = None,
    ) -> tuple[Array, Array, token_groups.Groups]:
        """A block on merged tokens: its output, the counters after it, and what was merged."""
        x = layer.before_attention(h)
        groups = self.groups(h, x, counter, position)

        def back(value, i):
            value = token_groups.unmerge(groups, value)
            return (
                value if stored is None else token_groups.mix(groups, value, stored[i], self.mixing)
            )

        if self.kind == "tokens":
            h = h + layer.attention(x, None)
        else:
            members = token_groups.sizes(groups) if self.proportional else None
            h = h + back(layer.attention(token_groups.merge(groups, x), members), 0)
        x = layer.before_mlp(h)
        if self.kind == "tome":
            h = h + layer.mlp(x)
        else:
            h = h + back(layer.mlp(token_groups.merge(groups, x)), 1)
        return h, token_groups.count_up(groups, counter), groups

    def trunk(
        self,
        stored: tuple[Array, Array] | None,
        position: Int[Array, " w"] | None,
        blocks: Block,
        h: Float[Array, "b n d"],
        c: Float[Array, "b d"],
        counter: Int[Array, "b n"],
    ) -> tuple[Float[Array, "b n d"], Int[Array, "b n"]]:
        """The blocks on merged tokens; besides, the counters after them."""
        if self.kind == "nothing":
            return jax.lax.scan(lambda h, block: (block(h, c), None), h, blocks)[0], counter

        def body(carry, xs):
            block, stored = xs
            h, counter, _ = self.layer(parts(block, c), *carry, stored, position)
            return (h, counter), None

        return jax.lax.scan(body, (h, counter), (blocks, stored))[0]

    def tokens(self) -> tuple[int, int]:
        """Tokens that enter attention and the MLP."""
        n = self.grid[0] * self.grid[1]
        removed = {
            "windows": (3 * self.count, 3 * self.count),
            "tokens": (0, self.count),
            "tome": (self.count, 0),
            "nothing": (0, 0),
        }[self.kind]
        return n - removed[0], n - removed[1]

    def flops(self, model: ModelConfig, stage: int) -> int:
        """Of one block and image, with the cosines that decide and the sums of merged tokens."""
        matching = 0
        if self.kind in ("tokens", "tome"):
            destinations = len(token_groups.cells(self.grid, (2, 2)))
            n = self.grid[0] * self.grid[1]
            matching = 2 * (n + self.count) * destinations * model.width
        return block_flops(model, stage, *self.tokens()) + matching


def store_branches(
    stored: tuple[Array, Array], blocks: Block, h: Float[Array, "b n d"], c: Float[Array, "b d"]
) -> tuple[Float[Array, "b n d"], tuple[Array, Array]]:
    """The plain trunk; besides, the gated branches of every block, each [depth, b, n, d]."""

    def body(carry, xs):
        h, stored = carry
        block, layer = xs
        h, branches = full_layer(parts(block, c), h)
        stored = tuple(
            jax.lax.dynamic_update_index_in_dim(old, new, layer, 0)
            for old, new in zip(stored, branches)
        )
        return (h, stored), None

    layers = np.arange(len(stored[0]), dtype=np.uint32)
    return jax.lax.scan(body, (h, stored), (blocks, layers))[0]


@dataclass(frozen=True)
class Merged:
    """The method of a stage's segments (see `flow.method.Method`): the ways to merge in it.

    A full step stores the gated branches of every block. Cheap steps read them, and carry the
    counters of `token_groups.count_up` from block to block and from step to step. The inputs of a
    step name its way, and for ToMe the positions drawn for it.

    Attributes:
      ways: branches of one program; a cheap step takes one.
      protected: whether there are full steps. Where there are none, nothing is stored.
    """

    ways: tuple[Merging, ...]
    protected: bool = True
    name: str = "merged"
    level: str = "network"

    def memory(self, evaluation: Evaluation) -> Any:
        def trunk(blocks: Block, h: Float[Array, "b n d"], c: Float[Array, "b d"]):
            depth = jax.tree.leaves(blocks)[0].shape[0]
            stored = (jnp.zeros((depth, *h.shape)),) * 2 if self.protected else None
            return h, {"counter": jnp.zeros(h.shape[:2], jnp.int32), "stored": stored}

        return evaluation.call(trunk=trunk)[1]

    def evaluate(self, evaluation: Evaluation, memory: Any) -> tuple[Array, Any]:
        call, inputs, full = evaluation
        return call(trunk=partial(self.trunk, memory, inputs, full))

    def trunk(
        self,
        memory: Any,
        inputs: Any,
        full: Bool[Array, ""] | bool,
        blocks: Block,
        h: Float[Array, "b n d"],
        c: Float[Array, "b d"],
    ) -> tuple[Float[Array, "b n d"], Any]:
        """The blocks, in full or merged; besides, the memory after them."""

        def store(x, stored):
            h, stored = store_branches(stored, blocks, x[0], c)
            return (h, x[1]), stored

        def merge(x, stored):
            trunks = [partial(w.trunk, stored, inputs.get("position"), blocks) for w in self.ways]
            return jax.lax.switch(inputs["way"], trunks, x[0], c, x[1])

        x, stored = (h, memory["counter"]), memory["stored"]
        if self.protected:
            x, stored = either(full, store, merge, x, stored)
        else:
            x = merge(x, stored)
        return x[0], {"counter": x[1], "stored": stored}

    def flops(self, model: ModelConfig, stage: int, full: bool, inputs: Any) -> int:
        way = self.ways[inputs["way"]]
        block = block_flops(model, stage) if full else way.flops(model, stage)
        return model.blocks_at(stage) * block + ends_flops(model, stage)
