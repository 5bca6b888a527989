"""Which steps are computed in full, and with what weights the others are forecast (NumPy)."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float, Int

SCHEDULES = ("taylor", "fora", "deepcache")
BASES = ("taylor", "hermite", "newton", "adams")
_CONTRACTION = 0.5  # sigma of HiCache


def full_steps(
    schedule: str, steps: int, interval: int, warmup: int, centre: float
) -> Bool[np.ndarray, " k"]:
    """Which of `steps` steps are full.

    Args:
      schedule: `taylor` (TaylorSeer, arXiv 2503.06923): the first `warmup` steps, then every
        `interval`-th. `fora` (arXiv 2407.01425): counted from the end, so that the last step is
        full, and the first one. `deepcache` (arXiv 2312.00858, Sec. 3.4): as many as every
        `interval`-th, dense around the step `centre * steps`.
      interval: steps from one full step to the next; 1 makes every step full.
      centre: of `deepcache`, as a share of the steps.
    """
    i = np.arange(steps)
    if schedule == "taylor":
        return (i < warmup) | ((i - warmup + 1) % interval == 0)
    if schedule == "fora":
        return (i == 0) | ((steps - 1 - i) % interval == 0)
    full = np.zeros(steps, bool)
    full[_dense_around(int(centre * steps), steps, -(-steps // interval))] = True
    return full


def _dense_around(centre: int, steps: int, count: int) -> Int[np.ndarray, " n"]:
    """`count` different steps, the first one among them, at centre + u^power for equally spaced u.

    The published power of 1.4 is lowered by 0.02 until rounding leaves `count` of them; power 1
    is equal spacing.
    """
    for power in np.arange(1.4, 0.99, -0.02):
        ends = -(centre ** (1 / power)), (steps - centre) ** (1 / power)
        u = np.linspace(*ends, count + 1)[:-1]
        chosen = np.unique(np.round(np.sign(u) * np.abs(u) ** power).astype(int) + centre)
        if len(chosen) == count and chosen[0] == 0 and chosen[-1] < steps:
            return chosen
    return np.arange(count) * steps // count


def weight_table(
    basis: str, order: int, full: Bool[np.ndarray, " k"], warmup: int
) -> Float[np.ndarray, "k h"]:
    """Weights of the last `order` + 1 full values in the value used at every step, float64.

    Column s is a slot of a ring: the n-th full step writes slot n mod (order + 1). Every row
    sums to one; slots not yet written have weight zero.

    Args:
      basis: `taylor` is TaylorSeer's recursion, in which differences over the latest gap stand
        for derivatives: D0 = F, D[j+1] = (D[j] - D[j] at the full step before) / gap, forecast
        sum_j D[j] x^j / j! at x steps later. It damps: a quadratic is missed by -gap x.
        `hermite` is HiCache (arXiv 2508.16984), which puts s^j H_j(s x) in the place of x^j, H the
        physicists' Hermite polynomials and s = 0.5.
        `newton` is the polynomial through the last values. `adams` is the mean over the step
        that follows of that polynomial (Adams-Bashforth), at full steps too.
      order: degree at most; it grows by one per full step. 0 repeats the last full value.
      full: `full_steps`; the first step must be.
      warmup: of the schedule; `taylor` forms no differences in steps up to warmup - 2.

    Steps count as equally spaced, which they are within a stage.
    """
    steps = len(full)
    table, known = np.zeros((steps, order + 1)), []
    differences: list[np.ndarray] = []
    for i in range(steps):
        if full[i]:
            own = np.eye(order + 1)[len(known) % (order + 1)]
            if basis in ("taylor", "hermite"):
                # the ring reuses the slot whose value the highest difference drops here
                differences = _differences(
                    own, differences, order, i - known[-1] if known and i > warmup - 2 else 0
                )
            known.append(i)
        if basis in ("taylor", "hermite"):
            x = i - known[-1]
            powers = [_power(basis, j, x) / math.factorial(j) for j in range(len(differences))]
            table[i] = sum(d * power for d, power in zip(differences, powers))
            continue
        last = range(max(0, len(known) - order - 1), len(known))
        slots, at = [n % (order + 1) for n in last], [known[n] for n in last]
        if basis == "newton" or order == 0:
            table[i, slots] = _polynomial(at, np.array([float(i)]))[:, 0]
        else:
            nodes, weights = np.polynomial.legendre.leggauss(order // 2 + 1)
            table[i, slots] = _polynomial(at, i + (nodes + 1) / 2) @ (weights / 2)
    return table


def _power(basis: str, j: int, x: int) -> float:
    """What stands for x^j."""
    if basis == "taylor" or x == 0:  # a full step is itself
        return float(x**j)
    s = _CONTRACTION
    return s**j * np.polynomial.hermite.hermval(s * x, np.eye(j + 1)[j])


def _differences(own, old: list[np.ndarray], order: int, gap: int) -> list[np.ndarray]:
    """Taylor factors at a full step as weights of values; no gap: none but the value."""
    new = [own]
    for j in range(min(order, len(old)) if gap else 0):
        new.append((new[j] - old[j]) / gap)
    return new


def _polynomial(at: list[int], where: Float[np.ndarray, " q"]) -> Float[np.ndarray, "n q"]:
    """Lagrange basis of the points `at`, at the points `where`."""
    return np.stack(
        [
            np.prod([(where - b) / (a - b) for b in at if b != a] or [np.ones_like(where)], axis=0)
            for a in at
        ]
    )
