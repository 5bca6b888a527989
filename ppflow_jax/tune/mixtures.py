"""A model's velocity with mixed branches, and the updates of a router, compiled once a stage."""

from __future__ import annotations

import copy
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ppflow_jax.api.model import Model
from ppflow_jax.flow.evaluate import Evaluator
from ppflow_jax.flow.fitted import Fitted
from ppflow_jax.flow.tables import Facts, Networks
from ppflow_jax.systems.harmonica import Learned, Mixed, Router, learned
from ppflow_jax.systems.routed import Kept
from ppflow_jax.tune.calibrate import Trajectories
from ppflow_jax.tune.calibrated_steps import at, groups, parts
from ppflow_jax.tune.features import PART
from ppflow_jax.tune.fit import Field


class Mixtures(Field):
    """Steps of a plan of Euler's method with mixed branches.

    Args:
      rate: of the updates of a router.

    Attributes:
      fixed: steps at which a memory begins.
    """

    def __init__(self, model: Model, channels: int, plan: Fitted, rate: float):
        super().__init__(model, channels)
        self.rate, self.method = rate, Mixed()
        self._on(plan)
        options = dict(static_argnames="where", donate_argnames="memory")
        self._shapes = functools.cache(self._shapes_of)
        self._mixed, self._learned = (jax.jit(f, **options) for f in (self._mix, self._learn))

    def _on(self, plan: Fitted) -> Mixtures:
        self.plan, self.fixed = plan, [group[0] for group in groups(plan)]
        return self

    def on(self, plan: Fitted) -> Mixtures:
        """The same programs for the steps of another plan."""
        return copy.copy(self)._on(plan)

    def step(
        self,
        i: int,
        x: Float[Array, "n h w c"],
        y: Int[Array, " n"],
        memory: Kept | None,
        scores: Float[Array, "depth 2"] | None,
    ) -> tuple[Float[Array, "n h w c"], Kept | None]:
        """The state after step i, and the memory; without scores the plain network's."""
        t, scale, where = self._at(i)
        if scores is None:
            stage, guided = where
            v = self._compiled(self.model.params, x, t, y, scale, stage=stage, guided=guided)
            return x + self._length(i) * v, None
        if memory is None:
            memory = self._memory(len(y), where)
        v, memory = self._mixed(self.model.params, x, y, (t, scale), memory, scores, where=where)
        return x + self._length(i) * v, memory

    def update(
        self,
        router: Router,
        i: int,
        x: Float[Array, "n h w c"],
        y: Int[Array, " n"],
        memory: Kept,
        weight: float,
        price: Float[np.ndarray, "depth 2"],
    ) -> tuple[Float[Array, "n h w c"], Learned]:
        """The state after step i by mixed branches, and what was learned from it."""
        t, scale, where = self._at(i)
        router_at = router, np.int32(i)
        terms = np.float32(weight), np.float32(price)
        given = self.model.params, x, y, (t, scale), memory, router_at, terms
        now = self._learned(*given, where=where)
        return x + self._length(i) * now.output, now

    def ends(
        self, masks: Bool[np.ndarray, "steps depth 2"], given: Trajectories
    ) -> Float[np.ndarray, "n h w c"]:
        """Where a plan leads from the noises of trajectories, with masks as scores of 0 and 1."""
        ends = []
        for part in parts(len(given.labels), PART):
            x, y = jnp.asarray(given.states[0, part]), jnp.asarray(given.labels[part])
            memory = None
            for i, scores in enumerate(jnp.asarray(masks, jnp.float32)):
                x, memory = self.step(i, x, y, None if i in self.fixed else memory, scores)
            ends.append(np.asarray(x))
        return np.concatenate(ends)

    def _at(self, i: int) -> tuple[np.float32, np.float32, tuple[int, bool]]:
        """Time and guidance scale of a step, and what its programs are compiled for."""
        now = at(self.plan, i)
        return np.float32(now.t), np.float32(now.scale), (now.stage, now.scale != 1)

    def _length(self, i: int) -> np.float32:
        return np.float32(self.plan.times[i + 1] - self.plan.times[i])

    def _memory(self, n: int, where: tuple[int, bool]) -> Kept:
        """Zeros for n trajectories; scores of 1 do not see them."""
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self._shapes(n, *where))

    def _shapes_of(self, n: int, stage: int, guided: bool) -> Any:
        """Of a memory."""

        def memory(x, y):
            step = self._evaluations(
                self.model.params, y, jnp.float32(1), {}, None, (stage, guided)
            )
            step.velocity(x, jnp.float32(0), 0)
            return step.memories[0]["model"]

        given = np.zeros((n, *self.model.config.shape), np.float32), np.zeros(n, np.int32)
        return jax.eval_shape(memory, *given)

    def _evaluations(self, params, y, scale, memories, scores, where) -> Any:
        stage, guided = where
        facts = Facts("ode", (stage,), (guided,), self.method)
        given = self.guidance, Networks(params, None, y), facts
        of = Evaluator(self.model.network, None, self.model.card.flow, *given)
        return of.step(jnp.asarray(scale)[None], (memories,), {"scores": scores})

    def _mix(self, params, x, y, numbers, memory, scores, where):
        t, scale = numbers
        with jax.default_matmul_precision(self.precision):
            step = self._evaluations(params, y, scale, {"model": memory}, scores, where)
            return step.velocity(x, t, 0), step.memories[0]["model"]

    def _learn(self, params, x, y, numbers, memory, router_at, terms, where):
        (t, scale), (router, i), (weight, price) = numbers, router_at, terms
        stage, guided = where
        teacher = self._velocity(params, x, t, y, scale, stage=stage, guided=guided)

        def student(scores):
            return self._mix(params, x, y, numbers, memory, scores, where)

        return learned(router, i, student, teacher, weight, price, self.rate)
