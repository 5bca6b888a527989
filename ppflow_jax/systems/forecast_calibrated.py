"""Full steps chosen by what was measured on a model: static schedules, in NumPy.

A published rule and the shortest path see the same thing: `costs[i, j]`, the error that has come
together at step j when step i was the last full one.

MagCache (arXiv 2506.09045) and TeaCache (arXiv 2411.19108) skip while it stays below a threshold.
DPCache (CVPR 2026) and CEM (arXiv 2512.23258) choose all full steps at once by dynamic programming.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

SCHEDULES = ("dp", "magcache", "teacache")


def relative_changes(values: Float[np.ndarray, "k ..."]) -> Float[np.ndarray, " k"]:
    """mean |m_i - m_(i-1)| / mean |m_(i-1)| of TeaCache, 0 at the first step."""
    values = np.float64(values).reshape(len(values), -1)
    changes = np.abs(np.diff(values, axis=0)).mean(axis=1) / np.abs(values[:-1]).mean(axis=1)
    return np.concatenate([[0.0], changes])


def magnitude_ratios(residuals: Float[np.ndarray, "k ... d"]) -> Float[np.ndarray, " k"]:
    """Mean over tokens of |R_i| / |R_(i-1)| of MagCache, 1 at the first step.

    R is what all blocks add to a token.
    """
    norms = np.linalg.norm(np.float64(residuals), axis=-1).reshape(len(residuals), -1)
    return np.concatenate([[1.0], (norms[1:] / norms[:-1]).mean(axis=1)])


def teacache_costs(changes: Float[np.ndarray, " k"]) -> Float[np.ndarray, "k k"]:
    """The sum of the changes since the last full step."""
    costs = np.zeros((len(changes),) * 2)
    for i in range(len(changes)):
        costs[i, i + 1 :] = np.cumsum(changes[i + 1 :])
    return costs


def magcache_costs(ratios: Float[np.ndarray, " k"]) -> Float[np.ndarray, "k k"]:
    """sum_m |1 - r_(i+1) ... r_m| over the steps m up to j (MagCache)."""
    costs = np.zeros((len(ratios),) * 2)
    for i in range(len(ratios)):
        costs[i, i + 1 :] = np.cumsum(np.abs(1 - np.cumprod(ratios[i + 1 :])))
    return costs


def under_threshold(
    costs: Float[np.ndarray, "k k"],
    threshold: float,
    must: Bool[np.ndarray, " k"],
    longest: int | None = None,
) -> Bool[np.ndarray, " k"]:
    """Full steps of the rule that skips while the cost is below `threshold`.

    Args:
      must: steps that are full whatever they cost; the first is one.
      longest: skips in a row at most.
    """
    full, last = np.array(must), 0
    for i in range(len(full)):
        full[i] |= costs[last, i] >= threshold or (longest is not None and i - last > longest)
        last = i if full[i] else last
    return full


def under_budget(
    costs: Float[np.ndarray, "k k"], must: Bool[np.ndarray, " k"], count: int
) -> Bool[np.ndarray, " k"]:
    """The same with `count` full steps: the lowest threshold that takes no more.

    Where it takes fewer, those that have come to cost most follow, one after another.
    """
    for threshold in [*np.unique(costs), np.inf]:
        full = under_threshold(costs, threshold, must)
        if full.sum() <= count:
            break
    while full.sum() < count:
        last = np.maximum.accumulate(np.where(full, np.arange(len(full)), 0))
        full[np.argmax(np.where(full, -np.inf, costs[last, np.arange(len(full))]))] = True
    return full


def cheapest(errors: Float[np.ndarray, "k k k"]) -> list[tuple[float, tuple[int, ...]]]:
    """For 1, 2, ... k full steps, the first among them: the least sum of errors, and the steps.

    Args:
      errors: [h, i, m], of step m where i was the last full step and h the one before it; h = i
        where there is none.
    """
    k = len(errors)
    after = np.arange(k)[:, None] < np.arange(k)
    # What the steps between i and j cost together
    runs = np.zeros((k, k, k + 1))
    runs[:, :, 1:] = np.cumsum(np.where(after, errors, 0), axis=2)
    best = np.full((k, k), np.inf)
    best[0, 0] = 0
    came: list[np.ndarray] = []  # [i, j]: the full step before i
    found = []
    for _ in range(k):
        ends = best + runs[:, :, k]
        h, i = np.unravel_index(np.argmin(ends), ends.shape)
        total, way = float(ends[h, i]), [int(i)]
        for before in reversed(came):
            way.append(int(h))
            h, i = before[h, i], h
        found.append((total, tuple(reversed(way))))
        ways = np.where(after, best[:, :, None] + runs[:, :, :k], np.inf)
        came.append(np.argmin(ways, axis=0))
        best = np.min(ways, axis=0)
    return found


def cheapest_of_all(
    groups: Sequence[Float[np.ndarray, "_ _ _"]], count: int
) -> Bool[np.ndarray, " k"]:
    """`cheapest` for steps in groups that know nothing of one another, `count` full ones in all.

    Raises:
      ValueError: fewer than a full step for each group, or more than steps.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    first = 0
    for errors in groups:
        new: dict[int, tuple[float, tuple[int, ...]]] = {}
        for total, way in cheapest(errors):
            for spent, (before, ways) in best.items():
                n, both = spent + len(way), before + total
                if both < new.get(n, (np.inf,))[0]:
                    new[n] = both, (*ways, *(first + i for i in way))
        best, first = new, first + len(errors)
    if count not in best:
        raise ValueError(f"{count} full steps for {len(groups)} groups of {first} steps")
    full = np.zeros(first, bool)
    full[list(best[count][1])] = True
    return full
