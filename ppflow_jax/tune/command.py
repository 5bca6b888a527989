"""The work of the command `tune`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ppflow_jax.api.inputs import check_unconditional
from ppflow_jax.api.model import Model
from ppflow_jax.console import table
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic
from ppflow_jax.flow.fitted import Fitted
from ppflow_jax.flow.multistep import MULTISTEP, adams_bashforth
from ppflow_jax.generate.plan import check_tunable
from ppflow_jax.generate.plan_file import PlanFile
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.pyramid import Pyramid, Stage
from ppflow_jax.systems.routed import check_routable
from ppflow_jax.tune.allocate import Budget, best_allocation, shared_out, start_of
from ppflow_jax.tune.asked import ROUTER, Asked
from ppflow_jax.tune.fit import Field, error, refined
from ppflow_jax.tune.forecasts import tune_forecast
from ppflow_jax.tune.pareto import figure_of, front_of, point, text_of
from ppflow_jax.tune.patches import (
    assigned,
    fitted_patches,
    patch_errors,
    pyramid_of,
    say_what_was_not_trained,
    scales_at,
)
from ppflow_jax.tune.routers import tune_router

SIT_STEPS = 50
ROUNDS = 150  # of the gradient refinement


def tune(model: Model, asked: Asked) -> str:
    """Writes the plan; returns a table of its error beside those of the fixed solvers.

    Raises:
      InputError: none or several budgets, one below a step a stage, or other bad settings.
      RunError: trajectories or a loss that are not finite.
    """
    check_unconditional(model.config, "tune")
    check_tunable(model.config)
    if asked.forecast is not None and model.config.students:
        raise InputError(
            "the model has students in the place of blocks: tune its steps without --forecast"
        )
    if asked.forecast == ROUTER:
        check_routable(model.config)
        return tune_router(model, asked)
    if asked.forecast is not None:
        return tune_forecast(model, asked)
    asked.check_budget()
    cfg, field = asked.scales(model), Field(model, asked.cfg_channels)
    cost, budget = budget_of(field, cfg, asked)
    budget.allocations()
    out = asked.target()
    fit, held_out = asked.trajectories(model, cfg, out)
    plan, front = best_allocation(field, cfg, budget, fit), None
    if asked.choose_patches:
        say_what_was_not_trained(field)
        own = point(field, plan, budget.of(tuple(plan.counts.values())), held_out)
        times = np.linspace(plan.times[0], plan.times[-1], asked.evaluations + 1)
        times = np.float32(times).astype(float)
        errors = patch_errors(field, cfg, times, fit)
        costs = np.array(
            [[cost(stage, s) for stage in range(len(cfg))] for s in scales_at(field, cfg, times)]
        )
        assignments = assigned(errors, costs, budget.limit)
        points = front_of(field, cfg, times, errors, costs, (fit, held_out))
        chosen, left = fitted_patches(field, cfg, times, assignments, fit)
        plan = chosen if left < error(field, plan, fit) else plan
        front = {"unit": budget.unit, "points": points, "own": own}
        with atomic(out.with_suffix(".front.png")) as temporary:
            temporary.write_bytes(figure_of(front))
    if asked.refine:
        both = plan, refined(field, plan, fit, ROUNDS, asked.fit_scales)
        plan = min(both, key=lambda plan: error(field, plan, fit))
    errors = {"plan": error(field, plan, held_out)}
    usual = start_of(field, cfg, shared_out(field, budget))
    for name, rows in _fixed(field, usual).items():
        errors[name] = error(field, replace(usual, rows=rows), held_out)
    made = asked.made(
        model,
        errors,
        budget={budget.unit: budget.limit},
        patches=str(pyramid_of(field, plan)),
        refined=asked.refine,
        **({"front": front} if front else {}),
    )
    pyramid, flow = model.config.pyramid, model.card.flow
    PlanFile(plan, pyramid, flow, cfg, asked.cfg_channels, made).write(out)
    said = f"{text_of(front)}\n\n" if front else ""
    return said + _said(plan, usual, errors, out)


def _fixed(field: Field, usual: Fitted) -> dict[str, Any]:
    """Rows of the solvers to beat, on the steps of the aligned grid."""
    counts = list(usual.counts.values())
    restarts = tuple(np.cumsum(counts)[:-1].tolist())
    flow, times = field.model.card.flow, np.float64(usual.times)
    rows = {"euler": adams_bashforth(1, times)}
    return rows | {name: make(flow, times, restarts) for name, make in MULTISTEP.items()}


def _said(plan: Fitted, usual: Fitted, errors: dict[str, float], out: Path) -> str:
    def steps(of: Fitted) -> str:
        return "+".join(map(str, of.counts.values()))

    rows = [["", "steps", "error"], ["plan", steps(plan), f"{errors['plan']:.4f}"]]
    rows += [[k, steps(usual), f"{v:.4f}"] for k, v in errors.items() if k != "plan"]
    best = min(v for k, v in errors.items() if k != "plan")
    return (
        f"{table(rows)}\n{errors['plan'] / best:.2f} of the error of the best fixed solver, on "
        f"held-out noise; the plan is {out}"
    )


def budget_of(
    field: Field, cfg: tuple[float, ...], asked: Asked
) -> tuple[Callable[[int, float], float], Budget]:
    """The cost of an evaluation of a stage under a guidance scale, and the budget.

    Raises:
      InputError: no number above 0.
    """
    model, cost = field.model.config, lambda stage, scale: 1.0
    limit, unit = asked.evaluations, "evaluations"
    if asked.ms is not None:
        limit, unit = asked.ms, "milliseconds"
        cost = functools.cache(functools.partial(_milliseconds, field))
    elif asked.flops is not None:
        limit, unit = asked.flops, "of the FLOPs of SiT's 50 steps"
        fine = min((s.patch for s in model.pyramid.stages), key=np.prod)
        sit = replace(model, pyramid=Pyramid((Stage(1.0, fine),)), students=())
        whole = SIT_STEPS * forward_flops(sit, 0) * max(map(_rows, cfg))
        cost = lambda stage, scale: forward_flops(model, stage) * _rows(scale) / whole
    if not 0 < limit < np.inf:
        raise InputError(f"a budget of {limit:g}: give a number above 0")
    costs = tuple(cost(stage, scale) for stage, scale in enumerate(cfg))
    return cost, Budget(float(limit), costs, unit)


def _rows(scale: float) -> int:
    """Of the batch, for an image under this guidance."""
    return 2 if scale != 1 else 1


def _milliseconds(field: Field, stage: int, scale: float) -> float:
    """Of an evaluation of one image, in a batch of 64: the median of five."""
    x = np.zeros((64, *field.model.config.shape), np.float32)
    t = float(np.mean(field.model.config.pyramid.intervals[stage]))
    y, seconds = np.zeros(len(x), np.int32), []
    for _ in range(6):
        start = time.perf_counter()
        field.at(x, t, y, stage, scale)
        seconds.append(time.perf_counter() - start)
    return 1000 * float(np.median(seconds[1:])) / len(x)
