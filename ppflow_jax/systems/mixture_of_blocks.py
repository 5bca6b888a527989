"""Mixture of blocks (Dense2MoE, arXiv 2510.09094): a router leaves out whole blocks.

Of every group of `group` blocks that follow one another `kept` are computed, the others pass their
tokens on. The paper's router looks at the mean token and at the condition,
TopK(a W_x mean(x) + (1 - a) W_y c); here at the time alone, W SiLU(e(t)), so that all images of a
step take the same blocks and a left-out block costs nothing (see `LeftOut`).

A block's gates are multiplied by g = 1 or 0, with the gradient of the softmax over its group
(straight-through): in training all blocks are computed. With kept = group the model is what it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError
from ppflow_jax.flow.method import Evaluation
from ppflow_jax.flow.plan import Segment
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import block_flops, forward_flops
from ppflow_jax.models.layers import Block
from ppflow_jax.models.parts import Aux, Execution, Key, Leaves, Wrap
from ppflow_jax.systems.composition import Made, in_stages

ROUTER_SCALE = 0.02  # standard deviation of a fresh router


@dataclass(frozen=True)
class MixtureOfBlocks(Wrap):
    """Which blocks are computed.

    Attributes:
      group: blocks that follow one another, of which
      kept: are computed.

    Raises:
      InputError: a value out of its range.
    """

    group: int = 2
    kept: int = 1

    kind = "mob"

    def __post_init__(self):
        if not 1 <= self.kept <= self.group:
            raise InputError(f"{self}: group must be at least 1, kept in [1, group]")

    def check(self, model: ModelConfig) -> None:
        if model.block.norm is not None:
            raise InputError(
                f"config.model.wrap={self} goes through the gates of adaLN, which blocks with "
                f"{model.block.norm} do not have: leave config.model.norm out"
            )
        if model.depth % self.group:
            raise InputError(
                f"{self}: {model.depth} blocks are not whole groups of {self.group}: choose a "
                "group that divides them"
            )

    def modules(self, model: ModelConfig, run: Execution, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        return {"mob": Router(model.width, rngs)}

    def signals(
        self, leaves: Leaves, embed: Callable[[Array], Array], t: Float[Array, " b"]
    ) -> tuple[Float[Array, "depth b"], Aux]:
        """1 of blocks that are computed, 0 of the others, float32."""
        hidden = jax.nn.silu(embed(t).astype(jnp.float32))
        logits = jnp.einsum("bd,ld->lb", hidden, leaves["router"].astype(jnp.float32))
        share = jax.nn.softmax(logits.reshape(-1, self.group, len(t)), axis=1)
        best = jax.lax.top_k(jnp.moveaxis(share, 1, -1), self.kept)[1]
        mask = jnp.sum(jax.nn.one_hot(best, self.group), axis=-2)
        mask = jnp.moveaxis(mask, -1, 1)
        gate = mask + mask * (share - jax.lax.stop_gradient(share))
        return gate.reshape(logits.shape), {}

    def __call__(self, block: Block, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return x

    def gate(self, block: Block) -> Float[Array, " _"]:
        return block.signal[...]

    def flops(self, model: ModelConfig, tokens: int) -> int:
        """Of the router; all blocks are computed."""
        return 2 * model.width if tokens else 0

    def keys(self, layer: int) -> Iterator[Key]:
        name = f"blocks.{layer}.mob_{self.group}_{self.kept}.weight"
        yield Key(name, ("blocks", "mob", "router"), (layer,))

    @classmethod
    def read(cls, state: Any) -> MixtureOfBlocks | None:
        found = (re.fullmatch(r"blocks\.0\.mob_(\d+)_(\d+)\.weight", name) for name in state)
        match = next(filter(None, found), None)
        return match and cls(int(match[1]), int(match[2]))

    def start(self, model: ModelConfig, source: ModelConfig, blocks: Leaves, key: Array) -> Leaves:
        """A fresh router, beside blocks as they are."""
        router = ROUTER_SCALE * jax.random.normal(key, (model.depth, model.width))
        return blocks | {"mob": {"router": router}}


class Router(nnx.Module):
    """The leaf of one block."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.router = nnx.Param(ROUTER_SCALE * jax.random.normal(rngs.params(), (width,)))


@dataclass(frozen=True)
class MobConfig:
    """Sampling without the blocks that the router leaves out; the samples stay what they are.

    Attributes:
      mob: `true`.
      mob_stages: in which stages, 0 the coarsest; by default all.
    """

    mob: bool = True
    mob_stages: tuple[int, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """The method of a segment (see `flow.method.Method`); it remembers nothing.

    All images of a step have one time, so that one branch of the program for each block decides.
    """

    name: str = "left out"
    level: str = "network"

    def memory(self, evaluation: Evaluation) -> tuple[()]:
        return ()

    def evaluate(self, evaluation: Evaluation, memory: tuple[()]) -> tuple[Array, tuple[()]]:
        return evaluation.call(trunk=kept_blocks)[0], memory

    def flops(self, model: ModelConfig, stage: int, full: bool, inputs: Any) -> int:
        mob = model.block.wrap
        assert isinstance(mob, MixtureOfBlocks)
        out = model.depth // mob.group * (mob.group - mob.kept)
        return forward_flops(model, stage) - out * (block_flops(model, stage) - 2 * model.width)


def kept_blocks(
    blocks: Block, h: Float[Array, "b n d"], c: Float[Array, "b d"]
) -> tuple[Float[Array, "b n d"], None]:
    """A trunk of the blocks that the router keeps at the first image's time."""

    def body(h: Array, block: Block) -> tuple[Array, None]:
        if not isinstance(block.spec.wrap, MixtureOfBlocks):  # of a weaker network
            return block(h, c), None
        keep = block.signal[...][0] > 0
        return jax.lax.cond(keep, lambda h: block(h, c), lambda h: h, h), None

    return jax.lax.scan(body, h, blocks)


def without_left_out(
    segments: Iterable[Segment], model: ModelConfig, config: MobConfig
) -> list[Segment]:
    """The plan without what the router leaves out.

    Raises:
      InputError: a model without this router, or a stage that has another method.
    """
    if not isinstance(model.block.wrap, MixtureOfBlocks):
        raise InputError(
            f"mob is for blocks with a router that leaves some out, and the model has {model.block}"
        )
    if not config.mob:
        return list(segments)

    def make(stage: int, steps: int) -> Made:
        return LeftOut(), np.zeros(steps, bool), {}

    stages = config.mob_stages or tuple(range(len(model.pyramid)))
    return in_stages(segments, model, "mob", stages, make)
