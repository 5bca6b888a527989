"""Forecasts that were fitted to a model beforehand: the tables of every step of a plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ppflow_jax.errors import InputError
from ppflow_jax.flow.plan import Segment
from ppflow_jax.systems.forecast import (
    MAX_ORDER,
    PLACES,
    Forecast,
    alike,
    slots_of,
    with_method,
)


@dataclass(frozen=True)
class ForecastTables:
    """Which steps of a plan are full, and how the others are made of them.

    Attributes:
      method: what is forecast, and from how many values.
      depth: blocks of the model.
      full: of every step.
      weights: of the slots of the ring, whose memory begins anew in every stage.
    """

    method: Forecast
    depth: int
    full: Bool[np.ndarray, " steps"]
    weights: Float[np.ndarray, "steps slots"]

    @property
    def of_blocks(self) -> int | None:
        """Blocks that a model must have; None: any."""
        return self.depth if self.method.level == "network" else None

    def applied(self, segments: Iterable[Segment]) -> tuple[Segment, ...]:
        """The plan with these forecasts.

        Raises:
          InputError: a stage, or a change between guided and unguided, that does not begin with
            the values its forecasts weigh.
        """
        out, first = [], 0
        for group in alike(segments):
            now = slice(first, first + sum(s.steps for s in group))
            full, weights = self.full[now], self.weights[now]
            if not weighs_what_was_written(full, weights):
                raise InputError(
                    f"the plan has no full value yet where it forecasts from step {first} on: a "
                    "stage, and a change between guided and unguided, begins with a full step"
                )
            out.extend(with_method(group, self.method, full, weights))
            first = now.stop
        return tuple(out)

    @property
    def values(self) -> dict[str, Any]:
        """For a file."""
        method = self.method
        return {
            "place": method.place,
            "blocks": method.blocks if method.place == "blocks" else None,
            "depth": self.depth,
            "slots": method.slots,
            "full": self.full.tolist(),
            "weights": self.weights.tolist(),
        }

    @classmethod
    def of(cls, values: Any, steps: int) -> ForecastTables:
        """Of `values`.

        Raises:
          ValueError, TypeError, KeyError: not such values.
        """
        known = {"place", "blocks", "depth", "slots", "full", "weights"}
        if not isinstance(values, dict) or set(values) != known:
            raise ValueError(f"forecast has not the keys {', '.join(sorted(known))}")
        place, depth, slots = values["place"], values["depth"], values["slots"]
        if place not in PLACES:
            raise ValueError(f"unknown place {place!r} of forecasts")
        if not _whole(depth) or not _whole(slots) or slots > MAX_ORDER + 1:
            raise ValueError(f"forecast has depth {depth!r} and {slots!r} slots")
        blocks = values["blocks"]
        if (place == "blocks") != (blocks is not None):
            raise ValueError("forecast has blocks for another place, or none for blocks")
        if blocks is not None:
            first, last = blocks
            if type(first) is not int or not _whole(last) or not 0 <= first < last <= depth:
                raise ValueError(f"forecast has blocks {blocks} of {depth}")
        full = values["full"]
        if len(full) != steps or not all(type(f) is bool for f in full):
            raise ValueError(f"full is not {steps} times true or false")
        weights = np.array(values["weights"], np.float64)
        if weights.shape != (steps, slots) or not np.isfinite(np.float32(weights)).all():
            raise ValueError(f"weights of forecasts are not {steps} rows of {slots} finite numbers")
        method = Forecast(place, slots, (0, 0) if blocks is None else tuple(blocks))
        return cls(method, depth, np.array(full), weights)


def weighs_what_was_written(
    full: Bool[np.ndarray, " k"], weights: Float[np.ndarray, "k s"]
) -> bool:
    """Whether a group begins with a full step, full steps are themselves, and others weigh no slot
    before it is written."""
    slots = weights.shape[1]
    written = np.cumsum(full)[:, None] > np.arange(slots)
    own = np.eye(slots)[slots_of(full, slots)]
    return bool(full[0] and not weights[~written].any() and (weights[full] == own[full]).all())


def _whole(value: Any) -> bool:
    return type(value) is int and value > 0
