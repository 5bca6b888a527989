"""Which steps of a plan are full, by what is measured on fine trajectories of the model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float

from ppflow_jax.errors import RunError
from ppflow_jax.flow.fitted import Fitted
from ppflow_jax.systems.forecast_calibrated import (
    cheapest_of_all,
    magcache_costs,
    magnitude_ratios,
    relative_changes,
    teacache_costs,
    under_budget,
)
from ppflow_jax.tune.calibrate import Trajectories
from ppflow_jax.tune.features import At, Features, Probe

_DEGREE = 4  # of TeaCache's polynomial


def chosen_steps(
    schedule: str, features: Features, plan: Fitted, count: int, given: Trajectories
) -> Bool[np.ndarray, " steps"]:
    """`count` full steps, the first of every stage among them.

    Args:
      schedule: `dp` leaves the least error of velocities forecast along a line through the last two
        full features, times the length of the step; `magcache` and `teacache` are the published
        rules, with the threshold that the budget asks for.

    Raises:
      RunError: blocks that add nothing, or no finite numbers.
    """
    if schedule == "dp":
        return cheapest_of_all(forecast_errors(features, plan, given), count)
    must = np.zeros(len(plan.stages), bool)
    must[[group.start for group in groups(plan)]] = True
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios, inputs, outputs = _signals(features, plan, given)
    if not np.isfinite([ratios, inputs, outputs]).all():
        raise RunError(
            f"--schedule={schedule} compares what the blocks add to their tokens, which is 0 or no "
            "finite number here: train the model, or choose --schedule=dp"
        )
    if schedule == "magcache":
        costs = magcache_costs(ratios)
    else:
        seen = ~must
        degree = min(_DEGREE, seen.sum() - 1)
        fit = np.polyfit(inputs[seen], outputs[seen], degree, full=True)[0]  # full: no warning
        costs = teacache_costs(np.where(seen, np.polyval(fit, inputs), 0))
    return under_budget(costs, must, count)


def groups(plan: Fitted) -> list[range]:
    """Steps of every stage (and guidance)."""
    ends = np.cumsum([s.steps for s in plan.segments]).tolist()
    return [range(first, last) for first, last in zip([0, *ends], ends)]


def at(plan: Fitted, i: int) -> At:
    """Where a step starts."""
    return At(plan.times[i], plan.stages[i], plan.scales[i])


def parts(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, first + size)


def forecast_errors(
    features: Features, plan: Fitted, given: Trajectories
) -> list[Float[np.ndarray, "k k k"]]:
    """Of every stage, for `cheapest`: what a forecast of step m misses.

    Features of all steps enter by their inner products alone, so that every choice of full steps is
    judged by the same evaluations. How much of an error of features is one of the velocity is
    measured where those of the step before are used in their place.
    """
    found, lengths = [], np.diff(plan.times)
    states = given.at(np.float64(plan.times))
    for group in groups(plan):
        k, slots = len(group), features.method.slots
        products, moved = np.zeros((k, k)), np.zeros(k)
        for part in parts(len(given.labels), features.part(k, at(plan, group[0]))):
            y, values = given.labels[part], []
            memory = features.memory(len(y), at(plan, group[0]))
            for n, i in enumerate(group):
                x, now = states[i][part], at(plan, i)
                reused = features.cheap(x, y, now, memory, features.own((n - 1) % slots))
                v, memory = features.full(x, y, now, memory, n % slots)
                values.append(features.values(memory, n % slots))
                moved[n] += np.sum(np.square(np.float64(v) - reused))
            table = np.float64(values)
            products += table @ table.T
        errors = line_errors(products)
        changed = np.array([errors[max(m - 1, 0), max(m - 1, 0), m] for m in range(k)])
        share = np.divide(moved, changed, out=np.zeros(k), where=changed > 0)
        share[0] = 0  # always full
        found.append(errors * share * lengths[list(group)] ** 2)
    return found


def line_errors(products: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "k k k"]:
    """[h, i, m]: squared distance of value m from the line through values h and i, i repeated where
    h = i, from the inner products of all values."""
    k = len(products)
    h, i, m = np.ogrid[:k, :k, :k]
    ahead = np.where(i > h, (m - i) / np.where(i > h, i - h, 1), 0)
    of_i, of_h, square = 1 + ahead, -ahead, np.diag(products)
    errors = square[m] + of_i**2 * square[i] + of_h**2 * square[h]
    errors -= 2 * (of_i * products[i, m] + of_h * products[h, m] - of_i * of_h * products[h, i])
    return np.maximum(errors, 0)


def _signals(
    features: Features, plan: Fitted, given: Trajectories
) -> tuple[Float[np.ndarray, " k"], ...]:
    """Of every step: MagCache's ratio, TeaCache's change of the modulated input, and that of the
    velocity. The first steps of stages have none."""
    probe = Features(features.model, features.channels, Probe())
    sums, states = np.zeros((3, len(plan.stages))), given.at(np.float64(plan.times))
    for group in groups(plan):
        for part in parts(len(given.labels), probe.part(2, at(plan, group[0]))):
            y, before = given.labels[part], None
            memory = probe.memory(len(y), at(plan, group[0]))
            for i in group:
                v, (inputs, added) = probe.full(states[i][part], y, at(plan, i), memory, 0)
                if before is not None:
                    pairs = [np.stack(pair) for pair in zip(before, (added, inputs, v))]
                    ratios = magnitude_ratios(pairs[0])[1]
                    changes = [relative_changes(pair)[1] for pair in pairs[1:]]
                    sums[:, i] += np.array([ratios, *changes]) * len(y)
                before = added, inputs, v
    return tuple(sums / len(given.labels))
