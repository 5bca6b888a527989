"""Plans that were made beforehand: times, stages, scales and rows of every step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ppflow_jax.flow.multistep import Rows
from ppflow_jax.flow.plan import Segment, with_rows
from ppflow_jax.pyramid import Pyramid


@dataclass(frozen=True)
class Fitted:
    """A multistep plan.

    Attributes:
      times: grid points, float32 values, one more than steps.
      stages: whose patches each step uses, from coarse to fine.
      scales: guidance scale of each step; 1 does not evaluate the null class.
    """

    times: tuple[float, ...]
    stages: tuple[int, ...]
    scales: tuple[float, ...]
    rows: Rows

    @property
    def segments(self) -> tuple[Segment, ...]:
        """For `Sampler(segments=...)`."""
        segments, first = [], 0
        for (stage, scale), group in itertools.groupby(zip(self.stages, self.scales)):
            last = first + len(list(group))
            segments.append(Segment("multistep", (stage,), (scale,), self.times[first : last + 1]))
            first = last
        return with_rows(segments, self.rows)

    def guided(self, scales: tuple[float, ...], pyramid: Pyramid) -> Fitted:
        """The same with other guidance scales, one for every stage of the pyramid."""
        middles = [(a + b) / 2 for a, b in zip(self.times, self.times[1:])]
        return replace(self, scales=tuple(scales[pyramid.stage_at(t)] for t in middles))

    @property
    def counts(self) -> dict[int, int]:
        """Steps of every stage."""
        return {s: len(list(group)) for s, group in itertools.groupby(self.stages)}


def changes_in(stages: Sequence[int], scales: Sequence[float]) -> tuple[int, ...]:
    """Steps whose stage or guidance is another than that of the step before."""
    facts = list(zip(stages, scales))
    return tuple(i for i in range(1, len(facts)) if facts[i] != facts[i - 1])


def stepwise(
    times: np.ndarray, stages: tuple[int, ...], scales: tuple[float, ...], rows: Rows
) -> Fitted:
    """A plan with one guidance scale for every stage."""
    points = tuple(np.float32(times).tolist())
    return Fitted(points, stages, tuple(scales[stage] for stage in stages), rows)
