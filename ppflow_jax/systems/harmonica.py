"""Learned caching (HarmoniCa, arXiv 2410.01723): which branches are computed at which step.

A router has a score r = sigmoid(logit) for both branches of every block at every step. While it is
trained, a branch is r fresh + (1 - r) kept, on the way that such steps lead (`Mixed`); the scores
are then cut into masks, and a branch is computed or taken from memory (`Routed`). Formulas as in
the authors' code; see docs/harmonica.md for what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ppflow_jax.flow.method import Evaluation
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.layers import Block
from ppflow_jax.systems.routed import Kept, new_memory, through

THRESHOLD = 0.1  # scores above it replace what is kept
_LARGEST = 5.0  # logit


@dataclass(frozen=True)
class Mixed:
    """The method by which a router is trained (see `flow.method.Method`).

    A step's inputs are its scores, [depth, 2]. A branch is r fresh + (1 - r) kept, and becomes what
    is kept where r > threshold, without its gradient. Scores of 1 are the plain network, and need
    no memory; scores of 0 and 1 are `Routed`.
    """

    threshold: float = THRESHOLD
    level: str = "network"
    name: str = "mixed"

    def memory(self, evaluation: Evaluation) -> Kept:
        return evaluation.call(trunk=new_memory)[1]

    def evaluate(self, evaluation: Evaluation, memory: Kept) -> tuple[Array, Kept]:
        return evaluation.call(trunk=partial(self.trunk, memory, evaluation.inputs["scores"]))

    def trunk(
        self,
        memory: Kept,
        scores: Float[Array, "depth 2"],
        blocks: Block,
        h: Float[Array, "b n d"],
        c: Float[Array, "b d"],
    ) -> tuple[Float[Array, "b n d"], Kept]:
        """The tokens that leave the blocks, and what is kept."""

        @jax.checkpoint  # the gradient of a router needs no more memory than a pass
        def body(h, layer):
            block, kept, r = layer
            new = list(kept)

            def branch(n, fresh):
                value = r[n] * fresh() + (1 - r[n]) * kept[n]
                stays = jax.lax.stop_gradient(value).astype(kept[n].dtype)
                new[n] = jnp.where(r[n] > self.threshold, stays, kept[n])
                return value

            return through(block, h, c, branch), tuple(new)

        return jax.lax.scan(body, h, (blocks, memory, scores))

    def flops(self, model: ModelConfig, stage: int, full: bool, inputs: Any) -> int:
        """Of the plain network: nothing is left out."""
        return forward_flops(model, stage)


class Router(NamedTuple):
    """Logits of every step, and the state of their AdamW, which every step has of its own."""

    logits: Float[Array, "steps depth 2"]
    optimizer: Any


class Learned(NamedTuple):
    """What a step gives while its router is trained.

    Attributes:
      output: of the student, with mixed branches; its next step starts from it.
      worth: derivative of the weighted error of the output by every score, with its sign turned:
        what a little more of the fresh branch saves.
    """

    router: Router
    output: Array
    memory: Kept
    error: Float[Array, ""]
    loss: Float[Array, ""]
    worth: Float[Array, "depth 2"]


def optimizer(rate: float) -> optax.GradientTransformation:
    """AdamW without decay."""
    return optax.adamw(rate, weight_decay=0.0)


def router_of(logits: Float[Array, "steps depth 2"], rate: float) -> Router:
    """One that nothing has been learned by yet."""
    return Router(logits, jax.vmap(optimizer(rate).init)(logits))


def learned(
    router: Router,
    i: Int[Array, ""] | int,
    student: Callable[[Float[Array, "depth 2"]], tuple[Array, Kept]],
    teacher: Array,
    weight: Float[Array, ""] | float,
    price: Float[Array, "depth 2"] | float,
    rate: float,
) -> Learned:
    """One step of the trajectory, and one update of its router alone.

    The loss is weight * mean (teacher - student)^2 + sum price r, over all rows and channels of the
    guided output; logits stay within 5.

    Args:
      student: from scores: the output with mixed branches, and the new memory.
      weight: lambda of the step, see `step_weights`.
      price: of a score of 1; the paper's is one number.
    """
    pick = lambda of: jax.tree.map(lambda a: a[i], of)
    logits, state = pick(router)
    scores = jax.nn.sigmoid(logits)

    def error(scores):
        output, memory = student(scores)
        return jnp.mean(jnp.square(teacher - output)), (output, memory)

    (missed, (output, memory)), slope = jax.value_and_grad(error, has_aux=True)(scores)
    gradient = (weight * slope + price) * scores * (1 - scores)
    change, state = optimizer(rate).update(gradient, state, logits)
    logits = jnp.clip(optax.apply_updates(logits, change), -_LARGEST, _LARGEST)
    put = lambda every, one: jax.tree.map(lambda a, b: a.at[i].set(b), every, one)
    loss = weight * missed + jnp.sum(price * scores)
    new = put(router, Router(logits, state))
    return Learned(new, output, memory, missed, loss, -weight * slope)


def step_weights(
    step: Callable[[int, Array, Any, Any], tuple[Array, Any]],
    order: Sequence[int],
    fixed: Sequence[int],
    x: Array,
    scores: Float[Array, "steps depth 2"],
) -> tuple[dict[int, Array], Any]:
    """lambda of every step that is not fixed: what its scores change of the image.

    z_0 is where the plain steps lead; then one step after another, in the order of sampling, is
    taken by its scores, as those before it. lambda is mean (z_j - z_(j-1))^2, over all rows and
    pixels. Steps that are not switched yet are plain, so that the way up to the switched one is
    computed once.

    Args:
      step: (number, x, memory, scores) -> (x after the step, memory). A plain step has None for
        memory and scores; a fixed one None for its memory, and scores of 1.
      order: numbers of all steps as they are sampled.
      fixed: numbers of steps that compute everything, where a memory begins.

    Returns:
      lambda by step, and the memory after the last one.
    """

    def end(x: Array, rest: Sequence[int]) -> Array:
        for i in rest:
            x, _ = step(i, x, None, None)
        return x

    before, memory, found = end(x, order), None, {}
    for place, i in enumerate(order):
        if i in fixed:
            x, memory = step(i, x, None, jnp.ones_like(scores[i]))
            continue
        x, memory = step(i, x, memory, scores[i])
        now = end(x, order[place + 1 :])
        found[i] = jnp.mean(jnp.square(now - before))
        before = now
    return found, memory
