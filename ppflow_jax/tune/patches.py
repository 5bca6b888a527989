"""The patch of every step, by one calibration: dynamic programming over (step, patch, cost so far).

e(s, i) is the mean square of what patch size s misses of the finest one's velocity at step i, times
the square of the step's length; the cost of an evaluation is known. The assignment with the least
sum of e under a budget gives boundaries, number of levels and steps a level together. Patches only
become finer, and every change has a price, so that levels of hardly any use do not appear.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ppflow_jax.console import say
from ppflow_jax.errors import InputError
from ppflow_jax.flow.fitted import Fitted, changes_in
from ppflow_jax.flow.multistep import adams_bashforth
from ppflow_jax.pyramid import Pyramid, Stage
from ppflow_jax.tune.calibrate import Trajectories
from ppflow_jax.tune.fit import Field, closed_form, distance

CHANGE = 0.02  # price of a change of patch, as a share of the error of the coarsest throughout
TRIED = 6  # assignments that are fitted whole


def patch_errors(
    field: Field,
    cfg: Sequence[float],
    times: Float[np.ndarray, " points"],
    given: Trajectories,
) -> Float[np.ndarray, "steps stages"]:
    """e(s, i) on the states of fine trajectories; the guidance of a step is that of its time."""
    states, stages = given.at(times), range(len(cfg))
    errors = np.zeros((len(times) - 1, len(stages)))
    for i, scale in enumerate(scales_at(field, cfg, times)):
        values = [
            field.at(states[i], float(times[i]), given.labels, stage, scale) for stage in stages
        ]
        missed = [np.mean(np.square(np.float64(v) - values[-1])) for v in values]
        errors[i] = np.array(missed) * (times[i + 1] - times[i]) ** 2
    return errors


def assigned(
    errors: Float[np.ndarray, "steps stages"],
    costs: Float[np.ndarray, "steps stages"],
    limit: float,
) -> list[tuple[int, ...]]:
    """The stage of every step, by sums of errors and prices with a sum of costs up to `limit`.

    The least sum comes first; others are the best that end with another patch or cost.

    Raises:
      InputError: the coarsest patch throughout costs more.
    """
    steps, stages = errors.shape
    costs, limit = costs / limit, 1 + 1e-7  # sums are rounded to 9 digits
    if costs[:, 0].sum() > limit:
        raise InputError(
            f"the budget is less than {steps} steps with the coarsest patch: give more, or fewer "
            "--evaluations"
        )
    price = CHANGE * errors[:, 0].sum()
    # Of every stage at the last step: cost so far -> (least sum, stages)
    best: list[dict[float, tuple[float, tuple[int, ...]]]] = [
        {float(costs[0, s]): (float(errors[0, s]), (s,))} for s in range(stages)
    ]
    for i in range(1, steps):
        # What is left must at least pay for the coarsest.
        most = limit - costs[i + 1 :, 0].sum()
        new: list[dict[float, tuple[float, tuple[int, ...]]]] = [{} for _ in range(stages)]
        for s, into in enumerate(new):
            for came in range(s + 1):
                for spent, (total, way) in best[came].items():
                    cost = round(spent + float(costs[i, s]), 9)
                    total = total + float(errors[i, s]) + price * (came != s)
                    if cost <= most and total < into.get(cost, (np.inf,))[0]:
                        into[cost] = total, (*way, s)
        best = new
    found = sorted(found for ways in best for found in ways.values())
    return [stages for _, stages in found]


def scales_at(
    field: Field, cfg: Sequence[float], times: Float[np.ndarray, " points"]
) -> tuple[float, ...]:
    """Guidance of every step: that of the model's stage in its middle."""
    pyramid = field.model.config.pyramid
    return tuple(float(cfg[pyramid.stage_at(t)]) for t in (times[:-1] + times[1:]) / 2)


def with_patches(
    field: Field, cfg: Sequence[float], times: Float[np.ndarray, " points"], stages: Sequence[int]
) -> Fitted:
    """Adams-Bashforth on these steps, before it is fitted."""
    scales = scales_at(field, cfg, times)
    rows = adams_bashforth(2, times, changes_in(stages, scales))
    return Fitted(tuple(np.float32(times).tolist()), tuple(stages), scales, rows)


def fitted_patches(
    field: Field,
    cfg: Sequence[float],
    times: Float[np.ndarray, " points"],
    assignments: Sequence[tuple[int, ...]],
    given: Trajectories,
) -> tuple[Fitted, float]:
    """Of the first `TRIED` assignments the one whose plan ends nearest, and its distance."""
    found = []
    for stages in assignments[:TRIED]:
        plan, ends = closed_form(field, with_patches(field, cfg, times, stages), given)
        found.append((plan, distance(ends, given)))
    return min(found, key=lambda one: one[1])


def pyramid_of(field: Field, plan: Fitted) -> Pyramid:
    """The pyramid whose boundaries are where the plan changes its patch."""
    patches = [field.model.config.pyramid.stages[stage].patch for stage in plan.stages]
    ends = [i for i in range(len(patches)) if patches[i + 1 : i + 2] != [patches[i]]]
    return Pyramid(tuple(Stage(round(plan.times[i + 1], 4), patches[i]) for i in ends))


def say_what_was_not_trained(field: Field) -> None:
    """Patches are compared at times at which a stage may not have been trained."""
    run = field.model.card.experiment
    times = (run or {}).get("flow", {}).get("stage_times") or ()
    if not times:
        say(
            "every stage of this model was trained on its own times alone: its other patches say "
            "little elsewhere; train with config.flow.stage_times that overlap"
        )
