"""The place where accelerators plug into the sampler: how a segment evaluates the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from ppflow_jax.models.config import ModelConfig


class Evaluation(NamedTuple):
    """One evaluation of a step, as a method is given it.

    Attributes:
      call: computes the true value. At level `network`, `call()` is the prediction and
        `call(trunk=T)` is (prediction, what T returned besides), T a `models.network.Trunk` that
        replaces the scan over the blocks; at level `velocity`, `call()` is the velocity and
        `call(trunks=F)` is (velocity, {N: what F(N) returned besides}), F(N) the trunk of the
        network of name N.
      inputs: of the step, a row of `Segment.inputs`.
      full: whether the step is full; see `either`.
    """

    call: Callable[..., Any]
    inputs: Any
    full: Bool[Array, ""] | bool


@runtime_checkable
class Method(Protocol):
    """How the evaluations of a segment are computed. Static: frozen, hashable, no arrays.

    A step of a segment is *full* or *cheap*; the plan decides which, and what the method is given
    at each step (`Segment.inputs`, arrays with a leading axis of steps: weight tables, slots, ...).
    Both are branches of one program, so that what they share is compiled once. Whatever passes
    from one evaluation to the next is the method's *memory*, a pytree of arrays. The sampler keeps
    one for every evaluation of a step and for every network (guidance doubles the batch: even rows
    have the label, odd ones the null class), starts it with the largest numbers (integers: 0,
    booleans: false) where a segment does not keep the memory of the one before it, and carries it
    through the steps in place.

    A memory never outlives a stage, a change of batch rows, or a segment without a method.

    Attributes:
      level: `network` wraps every call of the network, `velocity` the guided velocity.
      name: what its cheap evaluations are called when a plan is explained.
    """

    level: str
    name: str

    def memory(self, evaluation: Evaluation) -> Any:
        """A new memory; only its shapes are used."""
        ...

    def evaluate(self, evaluation: Evaluation, memory: Any) -> tuple[Any, Any]:
        """The value of an evaluation, and the new memory."""
        ...

    def flops(self, model: ModelConfig, stage: int, full: bool, inputs: Any) -> int:
        """FLOPs of one evaluation of one image in a step with these inputs, without guidance."""
        ...


def either(
    full: Bool[Array, ""] | bool,
    record: Callable[[Any, Any], tuple[Any, Any]],
    reuse: Callable[[Any, Any], Any],
    x: Any,
    memory: Any,
) -> tuple[Any, Any]:
    """(x, memory) after `record(x, memory)` in a full step, or with `reuse(x, memory)` as x."""
    turns = jnp.asarray(full, int)
    # A loop of one turn or none changes its memory in place; a branch would copy it.
    x, memory = jax.lax.fori_loop(0, turns, lambda _, both: record(*both), (x, memory))
    return jax.lax.cond(full, lambda x, memory: x, reuse, x, memory), memory
