"""Intervals of time that MeanFlow is trained on, and the rows of a batch that they get.

A pair of times is drawn independently from one distribution and sorted: the interval [t, r]. By
where it lies, it is of one of these kinds, of the stage of its start t:

* `point`: t = r, a chosen share of all samples;
* `within`: r lies in the same stage;
* `across`: r lies in a later stage.

Every kind of every stage has its own rows of the batch, so that their number is known before
anything is computed. Given its kind, a pair is simple to draw: `within` is two draws of the stage
in order, `across` one draw of the stage and one of the times after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError
from ppflow_jax.pyramid import Pyramid

POINT, WITHIN, ACROSS = "point", "within", "across"
_MOST_ROWS = 16  # of a pattern, if so many are enough for a row of each kind


@dataclass(frozen=True)
class Times:
    """Distribution of one time: uniform, or logit-normal with the mean and std of logit t.

    Raises:
      InputError: another name, or a std that is not above 0.
    """

    name: str = "logit-normal"
    mean: float = 0.4
    std: float = 1.0

    def __post_init__(self):
        if self.name not in ("uniform", "logit-normal") or not self.std > 0:
            raise InputError(
                f"times {self.name} with std {self.std}: give uniform or logit-normal, and a std "
                "above 0"
            )

    def below(self, t: float) -> float:
        """Probability of times up to t."""
        if self.name == "uniform" or t in (0, 1):
            return float(t)
        z = (math.log(t / (1 - t)) - self.mean) / self.std
        return 0.5 * math.erfc(-z / math.sqrt(2))

    def at(self, u: Float[Array, " b"]) -> Float[Array, " b"]:
        """The time below which the probability is u, the inverse of `below`."""
        if self.name == "uniform":
            return u
        return jax.nn.sigmoid(self.mean + self.std * jax.scipy.special.ndtri(u))


LOGIT_NORMAL = Times()  # of the paper, whose time runs the other way: its mean is -0.4


class Kind(NamedTuple):
    """Intervals of one kind that start in one stage.

    Attributes:
      weight: probability among all intervals.
      rows: of the batch, in every pattern.
    """

    stage: int
    name: str
    weight: float
    rows: int


def kinds_of(pyramid: Pyramid, times: Times, points: float) -> tuple[Kind, ...]:
    """The kinds of intervals, by stage; `points` is the share of those with t = r.

    Rows are nearly in the ratio of the weights, and at least one of each.
    """
    ends = [times.below(end) for _, end in pyramid.intervals]
    found = []
    for stage, (before, end) in enumerate(zip([0.0, *ends], ends)):
        mass = end - before
        found += [
            (stage, POINT, points * mass),
            (stage, WITHIN, (1 - points) * mass**2),
            (stage, ACROSS, (1 - points) * 2 * mass * (1 - end)),
        ]
    found = [kind for kind in found if kind[2] > 0]
    rows = _rows([weight for _, _, weight in found])
    return tuple(Kind(*kind, count) for kind, count in zip(found, rows))


def _rows(weights: list[float]) -> list[int]:
    """Whole numbers in about the ratio of the weights, each at least 1.

    Of the patterns of 2, 4, 8, ... rows it is the first that misses the weights by no more than a
    tenth in all, or else the longest.
    """
    wanted, size = np.asarray(weights), 1
    while True:
        size *= 2
        ideal = wanted * size
        rows = np.maximum(np.floor(ideal + 1e-9).astype(int), 1)
        while rows.sum() < size:
            rows[np.argmax(ideal - rows)] += 1
        while rows.sum() > size and rows.max() > 1:
            rows[np.argmax(np.where(rows > 1, rows - ideal, -np.inf))] -= 1
        close = np.abs(rows / rows.sum() - wanted).sum() <= 0.1
        if rows.sum() == size and (close or size >= _MOST_ROWS):
            return rows.tolist()


def pairs(
    pyramid: Pyramid, times: Times, kinds: tuple[Kind, ...], draws: Float[Array, "2 b"]
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Starts t and ends r of the intervals of a batch, from uniform numbers in [0, 1).

    Row i is of the kind that has row i modulo the length of the pattern. t lies in its stage, r at
    or after it.
    """
    ends = [times.below(end) for _, end in pyramid.intervals]
    starts = [0.0, *ends]
    bounds, limits = [], []
    for kind in kinds:
        stage, (low, high) = kind.stage, pyramid.intervals[kind.stage]
        own = (starts[stage], ends[stage])
        across = kind.name == ACROSS
        bounds += [(*own, *((ends[stage], 1.0) if across else own))] * kind.rows
        limits += [(low, high, *((high, 1.0) if across else (low, high)))] * kind.rows
    repeats = draws.shape[1] // len(bounds)
    bound, limit = (jnp.tile(jnp.float32(rows).T, repeats) for rows in (bounds, limits))
    point = np.tile([k.name == POINT for k in kinds for _ in range(k.rows)], repeats)

    def drawn(u, low, high, first, last):
        return jnp.clip(times.at(low + (high - low) * u), first, last)

    a = drawn(draws[0], *bound[:2], *limit[:2])
    b = drawn(draws[1], *bound[2:], *limit[2:])
    return jnp.where(point, a, jnp.minimum(a, b)), jnp.where(point, a, jnp.maximum(a, b))
