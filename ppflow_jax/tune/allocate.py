"""How many steps every stage gets under a budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppflow_jax.errors import InputError
from ppflow_jax.flow.fitted import Fitted, stepwise
from ppflow_jax.flow.grids import aligned_grid
from ppflow_jax.flow.multistep import adams_bashforth
from ppflow_jax.tune.calibrate import Trajectories, grid_of
from ppflow_jax.tune.fit import Field, closed_form, distance

MOST = 40  # steps of a stage
TRIED = 6  # allocations that are fitted whole
ENOUGH = 1e-4  # of what one step of a stage leaves: further steps are not tried
Counts = tuple[int, ...]


@dataclass(frozen=True)
class Budget:
    """What a plan may cost an image.

    Attributes:
      limit: of the sum over the steps.
      costs: of a step of every stage under its guidance: 1 for evaluations, FLOPs, milliseconds.
    """

    limit: float
    costs: tuple[float, ...]
    unit: str = "evaluations"

    def of(self, counts: Counts) -> float:
        return sum(n * cost for n, cost in zip(counts, self.costs))

    def allocations(self) -> list[Counts]:
        """All that leave no room for a further step, of up to `MOST` a stage.

        Raises:
          InputError: not a step for every stage, or room for more than `MOST` of each.
        """
        limit = self.limit * (1 + 1e-9)
        spare = limit - sum(self.costs)
        if spare < 0:
            raise InputError(
                f"a budget of {self.limit:g} {self.unit} is less than one step of each of "
                f"{len(self.costs)} stage(s), {sum(self.costs):.4g}: give more"
            )
        most = [min(MOST, 1 + int(spare // cost)) for cost in self.costs]
        if self.of((MOST + 1,) * len(self.costs)) <= limit:
            raise InputError(
                f"{self.limit:g} {self.unit} are more than {MOST} steps of every stage, as many as "
                "are fitted; with more, ab2 needs no plan"
            )
        return [
            counts
            for counts in itertools.product(*(range(1, n + 1) for n in most))
            if (left := limit - self.of(counts)) >= 0
            and all(n == MOST or cost > left for n, cost in zip(counts, self.costs))
        ]


def shared_out(field: Field, budget: Budget) -> Counts:
    """Steps by the duration of stages, as the aligned grid has them: all that the budget takes."""
    pyramid, (lo, hi) = field.model.config.pyramid, field.model.card.flow.sample_interval()
    best = None
    for steps in range(len(pyramid), MOST * len(pyramid) + 1):
        # Boundaries are grid points in float32.
        grid = aligned_grid(lo, hi, steps, pyramid)
        ends = np.searchsorted(grid, np.float32([*pyramid.boundaries, hi]))
        counts = tuple(np.diff([0, *ends]).tolist())
        if budget.of(counts) <= budget.limit * (1 + 1e-9):
            best = counts
    return best or (1,) * len(pyramid)


def start_of(field: Field, cfg: Sequence[float], counts: Counts) -> Fitted:
    """Adams-Bashforth with equal steps in every stage."""
    times = grid_of(field.model, counts)
    stages = tuple(stage for stage, n in enumerate(counts) for _ in range(n))
    firsts = tuple(np.cumsum(counts)[:-1].tolist())
    return stepwise(times, stages, tuple(cfg), adams_bashforth(2, times, firsts))


def stage_errors(
    field: Field, cfg: Sequence[float], most: Counts, given: Trajectories
) -> list[list[float]]:
    """What n steps of a stage alone leave at its end: mean squares, for n from 1 on.

    A stage starts from the fine states, and is fitted in closed form. Where `ENOUGH` is reached,
    more steps leave as much.
    """
    found, pyramid = [], field.model.config.pyramid
    for stage, (start, end) in enumerate(pyramid.intervals):
        inside = (given.times >= np.float32(start)) & (given.times <= np.float32(end))
        here = Trajectories(given.times[inside], given.states[inside], given.labels)
        errors = []
        for n in range(1, most[stage] + 1):
            points = np.linspace(here.times[0], here.times[-1], n + 1)
            rows = adams_bashforth(2, points)
            plan = stepwise(points, (stage,) * n, tuple(cfg), rows)
            _, ends = closed_form(field, plan, here)
            errors.append(float(np.mean(np.square(ends - here.states[-1]))))
            if errors[-1] < ENOUGH * errors[0]:
                break
        found.append(errors + errors[-1:] * (most[stage] - len(errors)))
    return found


def best_allocation(
    field: Field, cfg: Sequence[float], budget: Budget, given: Trajectories
) -> Fitted:
    """The allocation whose closed-form plan has the lowest error, of those that promise most.

    The usual one, by the duration of stages, is among them.
    """
    allocations = budget.allocations()
    if len(allocations) > TRIED:
        most = tuple(max(column) for column in zip(*allocations))
        errors = stage_errors(field, cfg, most, given)

        def promised(counts: Counts) -> float:
            return sum(of_stage[n - 1] for of_stage, n in zip(errors, counts))

        allocations = sorted(allocations, key=promised)[:TRIED]
    tried = dict.fromkeys([shared_out(field, budget), *allocations])
    plans = [closed_form(field, start_of(field, cfg, counts), given) for counts in tried]
    return min(plans, key=lambda fitted: distance(fitted[1], given))[0]
