"""Branches by static masks: at every step a branch is computed, or is what was computed last.

The masks are made beforehand, by a router that learned them (`harmonica`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ppflow_jax.errors import InputError
from ppflow_jax.flow.method import Evaluation
from ppflow_jax.flow.plan import Segment
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import block_flops, ends_flops
from ppflow_jax.models.layers import Block
from ppflow_jax.systems.dydit import DyDiT
from ppflow_jax.systems.forecast import alike
from ppflow_jax.systems.forecast_blocks import depth_of

PLACE = "router"  # of such tables in a file
# Kept attention and MLP branches before their gates: depth, rows of the batch, tokens, width
Kept = tuple[Float[Array, "_ _ _ _"], Float[Array, "_ _ _ _"]]
# Whether attention and MLP of every block are computed
Pattern = tuple[tuple[bool, bool], ...]


def through(
    block: Block,
    x: Float[Array, "b n d"],
    c: Float[Array, "b d"],
    branch: Callable[[int, Callable[[], Array]], Array],
) -> Float[Array, "b n d"]:
    """The block's output, with `branch(n, fresh)` in the place of branch n, 0 attention and 1 MLP.

    What enters a branch already has those before it in it. `fresh` computes the block's own.
    """
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)
    outer, wrap = x, block.spec.wrap
    x = inner = x if wrap is None else wrap(block, x)
    x = x + gate1[:, None] * branch(0, partial(_attention, block, x, shift1, scale1))
    x = x + gate2[:, None] * branch(1, partial(_mlp, block, x, shift2, scale2))
    return x if wrap is None else x + (outer - inner)


def _attention(block: Block, x: Array, shift: Array, scale: Array) -> Array:
    return block.mix(block.modulated(0, x, shift, scale))


def _mlp(block: Block, x: Array, shift: Array, scale: Array) -> Array:
    return block.mlp(block.modulated(1, x, shift, scale))


def new_memory(
    blocks: Block, h: Float[Array, "b n d"], c: Float[Array, "b d"]
) -> tuple[Float[Array, "b n d"], Kept]:
    """A trunk that makes a memory; only its shapes are used."""
    branches = jnp.stack([h.astype(blocks.dtype)] * depth_of(blocks))
    return h, (branches, branches)


@dataclass(frozen=True)
class Routed:
    """The method of a segment: what a step's pattern does not compute is what was computed last.

    A step's input is the number of its pattern. Each pattern is compiled once.
    """

    patterns: tuple[Pattern, ...]
    level: str = "network"
    name: str = "routed"

    def memory(self, evaluation: Evaluation) -> Kept:
        return evaluation.call(trunk=new_memory)[1]

    def evaluate(self, evaluation: Evaluation, memory: Kept) -> tuple[Array, Kept]:
        number = evaluation.inputs["pattern"]

        def trunk(blocks, h, c):
            both = h, memory
            for i, pattern in enumerate(self.patterns):
                # A loop of one turn or none changes the memory in place; a branch would copy it.
                turns = jnp.asarray(number == i, int)
                run = lambda _, both, pattern=pattern: _computed(pattern, blocks, c, *both)
                both = jax.lax.fori_loop(0, turns, run, both)
            return both

        return evaluation.call(trunk=trunk)

    def flops(self, model: ModelConfig, stage: int, full: bool, inputs: Any) -> int:
        """What the pattern computes: branches, and modulation and projections of the ends always.

        What stands around a block (a wrap) is not computed where neither branch is.
        """
        costs, around = branch_flops(model, stage), _wrap_flops(model, _tokens(model, stage))
        modulation = block_flops(model, stage) - sum(costs) - around
        total = ends_flops(model, stage)
        for pair in self.patterns[int(inputs["pattern"])]:
            total += modulation + around * any(pair)
            total += sum(cost for cost, computed in zip(costs, pair) if computed)
        return total


def _computed(
    pattern: Pattern,
    blocks: Block,
    c: Float[Array, "b d"],
    h: Float[Array, "b n d"],
    memory: Kept,
) -> tuple[Float[Array, "b n d"], Kept]:
    """The trunk by one pattern: a scan over every run of blocks of which the same is computed."""

    def one(of: Any, i: Array) -> Any:
        take = lambda p: jax.lax.dynamic_index_in_dim(p, i, keepdims=False)
        return jax.tree.map(take, of)

    for pair, layers in itertools.groupby(range(len(pattern)), key=pattern.__getitem__):

        def body(both, i, pair=pair):
            h, memory = both
            block, new = one(blocks, i), list(memory)
            if not any(pair):
                return (block.gated(h, c, *one(memory, i)), memory), None

            def branch(n, fresh):
                if not pair[n]:
                    return one(memory[n], i)
                value = fresh()
                stays = value.astype(memory[n].dtype)
                new[n] = jax.lax.dynamic_update_index_in_dim(memory[n], stays, i, 0)
                return value

            return (through(block, h, c, branch), tuple(new)), None

        (h, memory), _ = jax.lax.scan(body, (h, memory), jnp.array(list(layers)))
    return h, memory


def branch_flops(model: ModelConfig, stage: int) -> tuple[int, int]:
    """FLOPs of the attention and the MLP branch of a block, without modulation and wrap."""
    neither = block_flops(model, stage, attention=0, mlp=0)
    wrap = _wrap_flops(model, _tokens(model, stage)) - _wrap_flops(model, 0)
    attention = block_flops(model, stage, mlp=0) - neither
    return attention, block_flops(model, stage, attention=0) - neither - wrap


def _wrap_flops(model: ModelConfig, tokens: int) -> int:
    """Of what stands around a block."""
    return 0 if model.block.wrap is None else model.block.wrap.flops(model, tokens)


def _tokens(model: ModelConfig, stage: int) -> int:
    rows, cols = model.pyramid.grid(stage, model.latent_size)
    return rows * cols


def check_routable(model: ModelConfig) -> None:
    """
    Raises:
      InputError: blocks whose branches cannot be computed one without the other.
    """
    if isinstance(model.block.wrap, DyDiT):
        raise InputError(
            "learned caching takes blocks apart whose routers decide what is computed: sample with "
            "--accelerate=width=1, or tune without --forecast=harmonica"
        )


@dataclass(frozen=True)
class RoutedTables:
    """Which branches every step of a plan computes.

    Attributes:
      depth: blocks of the model.
      computed: of every step and block: attention, MLP.
    """

    depth: int
    computed: Bool[np.ndarray, "steps depth 2"]

    @property
    def of_blocks(self) -> int | None:
        """Blocks that a model must have."""
        return self.depth

    def applied(self, segments: Iterable[Segment]) -> tuple[Segment, ...]:
        """The plan with these masks; the same mask has the same number in a stage.

        Raises:
          InputError: a stage, or a change between guided and unguided, that does not begin with a
            step that computes everything.
        """
        out, first = [], 0
        for group in alike(segments):
            masks = self.computed[first : first + sum(s.steps for s in group)]
            if not masks[0].all():
                raise InputError(
                    f"the plan has no branches yet that it could use again at step {first}: a "
                    "stage, and a change between guided and unguided, begins with a full step"
                )
            steps = [tuple((bool(a), bool(m)) for a, m in mask) for mask in masks]
            patterns = tuple(dict.fromkeys(steps))
            numbers = np.array([patterns.index(step) for step in steps], np.int32)
            full, place = masks.all(axis=(1, 2)), 0
            for segment in group:
                now = slice(place, place + segment.steps)
                routed = replace(segment, method=Routed(patterns), full=tuple(full[now].tolist()))
                inputs = {"pattern": numbers[now]}
                out.append(replace(routed, inputs=inputs, keeps=place > 0))
                place = now.stop
            first += place
        return tuple(out)

    @property
    def values(self) -> dict[str, Any]:
        """For a file: the mask of a step is 1 or 0 for attention and MLP of every block in turn."""
        masks = self.computed.reshape(len(self.computed), -1)
        steps = ["".join("01"[int(computed)] for computed in mask) for mask in masks]
        return {"place": PLACE, "depth": self.depth, "computed": steps}

    @classmethod
    def of(cls, values: Any, steps: int) -> RoutedTables:
        """Of `values`.

        Raises:
          ValueError, TypeError, KeyError: not such values.
        """
        if set(values) != {"place", "depth", "computed"}:
            raise ValueError("a router has not the keys computed, depth, place")
        depth, computed = values["depth"], values["computed"]
        if type(depth) is not int or depth < 1:
            raise ValueError(f"a router of depth {depth!r}")
        if len(computed) != steps or not all(isinstance(text, str) for text in computed):
            raise ValueError(f"computed is not {steps} texts")
        if any(len(text) != 2 * depth or set(text) - {"0", "1"} for text in computed):
            raise ValueError(f"computed is not of texts of {2 * depth} times 0 or 1")
        masks = np.array([[c == "1" for c in text] for text in computed])
        return cls(depth, masks.reshape(steps, depth, 2))
