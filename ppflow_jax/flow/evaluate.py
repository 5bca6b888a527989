"""One evaluation: the networks under guidance, as the method of the segment computes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ppflow_jax.flow.guidance import Guidance, Predict
from ppflow_jax.flow.method import Evaluation
from ppflow_jax.flow.path import Flow, velocity_from
from ppflow_jax.flow.tables import Facts, Networks
from ppflow_jax.models.conditions import GUIDANCE, INTERVAL, LABEL, Cond
from ppflow_jax.models.network import Apply, Trunk

# The memories of a method: of every evaluation of a step, by network
Memories = tuple[dict[str, Any], ...]
# The trunk of a network, by the network's name
Trunks = Callable[[str], Trunk]


@dataclass(frozen=True)
class Evaluator:
    """What the steps of a segment evaluate.

    Attributes:
      apply, weak: the network and a weaker one, if guidance takes one.
      nets: their parameters, and the labels.
    """

    apply: Apply
    weak: Apply | None
    flow: Flow
    guidance: Guidance
    nets: Networks
    facts: Facts

    def step(
        self,
        scale: Any,
        memories: Memories,
        inputs: Any = None,
        full: Any = True,
        length: Any = 0.0,
    ) -> Step:
        """The evaluations of a step.

        Args:
          scale: guidance scale of each.
          inputs, full: of the step, for the method.
          length: of the interval whose average velocity is evaluated.
        """
        return Step(self, scale, [dict(memory) for memory in memories], inputs, full, length)


@dataclass
class Step:
    """Evaluations of a step, by their numbers. `memories` changes with each of a method."""

    of: Evaluator
    scale: Any
    memories: list[dict[str, Any]]
    inputs: Any
    full: Any
    length: Any

    def velocity(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, ""],
        i: int,
        y: Cond | None = None,
    ) -> Float[Array, "b h w c"]:
        """dx/dt under guidance."""

        def value(trunks: Trunks | None = None) -> Any:
            found: dict[str, Any] = {}
            prediction = self.prediction(x, t, i, y, trunks, found)
            v = velocity_from(self.of.flow, prediction, x, _all(x, t))
            return v if trunks is None else (v, found)

        return self._through("velocity", "velocity", i, value)

    def prediction(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, ""],
        i: int,
        y: Cond | None = None,
        trunks: Trunks | None = None,
        found: dict[str, Any] | None = None,
    ) -> Float[Array, "b h w c"]:
        """Of the networks under guidance; `y` takes the place of the labels of all.

        With `trunks` each network is given that of its name; what it returns besides is put into
        `found`.
        """
        of, facts = self.of, self.of.facts
        y = self._told(of.nets.labels if y is None else y, i)

        def network(name: str, apply: Apply, params: Any) -> Predict:
            def predict(x: Array, t: Array, y: Cond) -> Array:
                call = partial(apply, params, x, t, y, facts.stages[i])
                if trunks is not None:
                    prediction, found[name] = call(trunk=trunks(name))
                    return prediction
                return self._through("network", name, i, call)

            return predict

        predict = network("model", of.apply, of.nets.params)
        if not facts.guide[i]:
            return predict(x, _all(x, t), y)
        weak = of.weak and network("weak", of.weak, of.nets.weak)
        return of.guidance(predict, weak, x, _all(x, t), y, self.scale[i])

    def _told(self, y: Cond, i: int) -> Cond:
        """`y` with what the sampler knows."""
        if not (names := self.of.facts.told):
            return y
        cond = y if isinstance(y, dict) else {LABEL: y}
        known = {INTERVAL: self.length, GUIDANCE: self.scale[i] - 1}
        return cond | {name: jnp.full(cond[LABEL].shape, known[name]) for name in names}

    def _through(self, level: str, name: str, i: int, call: Any) -> Any:
        """`call` by the method, where it works at this level."""
        method = self.of.facts.method
        if method is None or method.level != level:
            return call()
        evaluation, memory = Evaluation(call, self.inputs, self.full), self.memories[i].get(name)
        if memory is None:  # for shapes alone
            self.memories[i][name] = method.memory(evaluation)
            return call()
        value, self.memories[i][name] = method.evaluate(evaluation, memory)
        return value


def _all(x: Float[Array, "b h w c"], t: Float[Array, ""]) -> Float[Array, " b"]:
    return jnp.full(x.shape[:1], t)
