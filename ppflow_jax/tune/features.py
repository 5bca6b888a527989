"""A model's velocity with the features that forecasts rest on, compiled once for every stage."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ppflow_jax.api.model import Model
from ppflow_jax.flow.evaluate import Evaluator
from ppflow_jax.flow.method import Evaluation
from ppflow_jax.flow.tables import Facts, Networks
from ppflow_jax.systems.forecast import Forecast
from ppflow_jax.systems.forecast_blocks import depth_of, run_blocks
from ppflow_jax.tune.fit import Field

PART = 64  # trajectories at once, at most
BYTES = 2**28  # of features at once


class At(NamedTuple):
    """Where a step starts."""

    t: float
    stage: int
    scale: float


@dataclass(frozen=True)
class Probe:
    """What TeaCache and MagCache look at, as a method whose steps are all full.

    Its memory: the modulated input of the first block, and what all blocks add, [b, n, d] each.
    """

    level: str = "network"
    name: str = "probe"
    slots: int = 1

    def memory(self, evaluation: Evaluation) -> Any:
        return evaluation.call(trunk=lambda blocks, h, c: (h, (h, h)))[1]

    def evaluate(self, evaluation: Evaluation, memory: Any) -> tuple[Array, Any]:
        def trunk(blocks, h, c):
            first = jax.tree.map(lambda p: p[0], blocks)
            shift, scale, *_ = first.modulation(c)
            end = run_blocks(blocks, h, c, 0, depth_of(blocks))
            return end, (first.modulated(h, shift, scale), end - h)

        return evaluation.call(trunk=trunk)


class Features(Field):
    """Evaluations in full, or by forecast, of a method with its memory."""

    def __init__(self, model: Model, cfg_channels: int, method: Forecast | Probe):
        super().__init__(model, cfg_channels)
        self.method = method
        self._evaluate = jax.jit(self._evaluated, static_argnames=("where", "full"))
        self._slopes = jax.jit(self._sloped, static_argnames="where")
        self._shapes = functools.cache(self._shapes_of)

    def full(
        self, x: Float[np.ndarray, "n h w c"], y: Int[np.ndarray, " n"], at: At, memory: Any,
        slot: int,
    ) -> tuple[Float[np.ndarray, "n h w c"], Any]:  # fmt: skip
        """The velocity, and the memory with its features in the slot."""
        inputs = {"weights": self.own(slot), "slot": np.uint32(slot)}
        return self._call(self._evaluate, x, y, at, memory, inputs, full=True)

    def cheap(
        self, x: Float[np.ndarray, "n h w c"], y: Int[np.ndarray, " n"], at: At, memory: Any,
        weights: Float[np.ndarray, " s"],
    ) -> Float[np.ndarray, "n h w c"]:  # fmt: skip
        """The velocity of forecast features."""
        inputs = {"weights": np.float32(weights), "slot": np.uint32(0)}
        return self._call(self._evaluate, x, y, at, memory, inputs, full=False)[0]

    def slopes(
        self, x: Float[np.ndarray, "n h w c"], y: Int[np.ndarray, " n"], at: At, memory: Any,
        weights: Float[np.ndarray, " s"],
    ) -> tuple[Float[np.ndarray, "n h w c"], Float[np.ndarray, "n h w c s"]]:  # fmt: skip
        """The same, and its derivatives by the weights."""
        return self._call(self._slopes, x, y, at, memory, np.float32(weights))

    def memory(self, n: int, at: At) -> Any:
        """A memory of zeros for n trajectories."""
        shapes = self._shapes(n, *_where(at))
        return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)

    def part(self, steps: int, at: At) -> int:
        """How many trajectories are taken at once, given the steps whose features are compared."""
        leaves = jax.tree.leaves(self._shapes(1, *_where(at)))
        size = sum(a.size * a.dtype.itemsize for a in leaves) // self.method.slots
        most = max(1, BYTES // (2 * size * steps))  # twice: they are compared in float64
        return min(PART, 1 << (most.bit_length() - 1))

    def values(self, memory: Any, slot: int) -> Float[np.ndarray, " d"]:
        """All features of a slot."""
        axis = int(self.method.place == "branch")
        leaves = [np.take(leaf, slot, axis).ravel() for leaf in jax.tree.leaves(memory)]
        return np.concatenate(leaves)

    def own(self, slot: int) -> Float[np.ndarray, " s"]:
        """Weights of one slot."""
        return np.eye(self.method.slots, dtype=np.float32)[slot]

    @property
    def _name(self) -> str:
        return "velocity" if self.method.level == "velocity" else "model"

    def _call(self, program: Any, x: Any, y: Any, at: At, memory: Any, *given: Any, **static: Any):
        numbers = np.float32(at.t), np.float32(at.scale)
        found = program(
            self.model.params, x, y, numbers, memory, *given, where=_where(at), **static
        )
        return jax.tree.map(np.asarray, found)

    def _shapes_of(self, n: int, stage: int, guided: bool) -> Any:
        """Of a memory."""
        given = np.zeros((n, *self.model.config.shape), np.float32), np.zeros(n, np.int32)
        inputs = {"weights": self.own(0), "slot": np.uint32(0)}

        def empty(x, y):
            scale, where = np.float32(1), (stage, guided)
            step = self._step(self.model.params, y, scale, {}, inputs, True, where)
            step.velocity(x, jnp.float32(0), 0)
            return step.memories[0][self._name]

        return jax.eval_shape(empty, *given)

    def _step(self, params, y, scale, memories, inputs, full, where):
        model, (stage, guided) = self.model, where
        facts = Facts("ode", (stage,), (guided,), self.method)
        given = self.guidance, Networks(params, None, y), facts
        of = Evaluator(model.network, None, model.card.flow, *given)
        return of.step(jnp.asarray(scale)[None], (memories,), inputs, full)

    def _evaluated(self, params, x, y, numbers, memory, inputs, where, full):
        t, scale = numbers
        with jax.default_matmul_precision(self.precision):
            step = self._step(params, y, scale, {self._name: memory}, inputs, full, where)
            return step.velocity(x, t, 0), step.memories[0][self._name]

    def _sloped(self, params, x, y, numbers, memory, weights, where):
        def velocity(weights):
            inputs = {"weights": weights, "slot": jnp.uint32(0)}
            return self._evaluated(params, x, y, numbers, memory, inputs, where, False)[0]

        return velocity(weights), jax.jacfwd(velocity)(weights)


def _where(at: At) -> tuple[int, bool]:
    """What a program is compiled for."""
    return at.stage, at.scale != 1
