"""Forecasts fitted to a model: full steps and, for every other step, weights of the ring's slots.

All forecast caches are linear in what they keep, so that their weights can be learned (L2P, arXiv
2604.26365). A row is fitted so that the state after its step is that of the fine trajectory, from
the states that the rows before lead to: ridge least squares around the polynomial through the
slots, the velocity taken as linear in the weights around the row so far (Gauss-Newton).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ppflow_jax.api.model import Model
from ppflow_jax.console import table
from ppflow_jax.errors import RunError
from ppflow_jax.flow.fitted import Fitted, stepwise
from ppflow_jax.flow.multistep import adams_bashforth
from ppflow_jax.generate.plan_file import PlanFile
from ppflow_jax.systems.forecast import Forecast, slots_of
from ppflow_jax.systems.forecast_schedule import weight_table
from ppflow_jax.systems.forecast_tables import ForecastTables
from ppflow_jax.tune.asked import Asked
from ppflow_jax.tune.calibrate import Trajectories
from ppflow_jax.tune.calibrated_steps import at, chosen_steps, groups, parts
from ppflow_jax.tune.features import At, Features
from ppflow_jax.tune.fit import distance, ridge

ORDER = 2  # of the polynomials, one less than slots
TURNS = 2  # of Gauss-Newton


@dataclass
class State:
    """Some trajectories on their way."""

    x: Float[np.ndarray, "n h w c"]
    y: Int[np.ndarray, " n"]
    memory: Any = None


def tune_forecast(model: Model, asked: Asked) -> str:
    """Writes the plan; returns a table of its error beside those of other plans.

    Raises:
      InputError: flags that do not go together, or numbers out of range.
      RunError: trajectories or states that are not finite.
    """
    steps, count = asked.check_forecast(len(model.config.pyramid))
    cfg = asked.scales(model)
    depth = model.config.depth
    blocks = (0, depth) if asked.forecast == "blocks" else (0, 0)
    features = Features(model, asked.cfg_channels, Forecast(asked.forecast, ORDER + 1, blocks))
    out = asked.target()
    fit, held_out = asked.trajectories(model, cfg, out)
    plan = euler(model, cfg, steps)
    full = chosen_steps(asked.schedule, features, plan, count, fit)
    prior = polynomials(features, plan, full, "newton")
    both = prior, rolled(features, plan, prior, fit, fits=True)[0]
    tables = min(both, key=lambda tables: error(features, plan, tables, fit))
    errors = {"plan": error(features, plan, tables, held_out)}
    for n in (count, steps):
        grid = euler(model, cfg, n)
        every = polynomials(features, grid, np.ones(n, bool), "newton")
        errors[f"euler, {n} steps"] = error(features, grid, every, held_out)
    for name, chosen in (("even", evenly(plan, count)), (asked.schedule, full)):
        for basis in ("taylor", "hermite"):
            rows = polynomials(features, plan, chosen, basis)
            errors[f"{basis}, {name}"] = error(features, plan, rows, held_out)
    budget = {"steps": steps, "full": count}
    made = asked.made(model, errors, budget=budget, schedule=asked.schedule)
    pyramid, flow = model.config.pyramid, model.card.flow
    PlanFile(plan, pyramid, flow, cfg, asked.cfg_channels, made, tables).write(out)
    return _said(asked, full, errors, out)


def euler(model: Model, cfg: tuple[float, ...], steps: int) -> Fitted:
    """Euler's method on the aligned grid."""
    usual = model.plan(steps=steps, solver="euler", cfg=cfg)
    stages = tuple(s.stages[0] for s in usual.segments for _ in range(s.steps))
    times = np.float64(usual.times)
    return stepwise(times, stages, cfg, adams_bashforth(1, times))


def evenly(plan: Fitted, count: int) -> Bool[np.ndarray, " steps"]:
    """Full steps spread over the stages by their steps, and evenly in each."""
    full = np.zeros(len(plan.stages), bool)
    sizes = np.array([len(group) for group in groups(plan)])
    shares = np.ones(len(sizes), int)
    while shares.sum() < count:
        shares[np.argmax(np.where(shares < sizes, sizes / shares, 0))] += 1
    for group, n in zip(groups(plan), shares):
        full[group.start + np.arange(n) * len(group) // n] = True
    return full


def polynomials(
    features: Features, plan: Fitted, full: Bool[np.ndarray, " steps"], basis: str
) -> ForecastTables:
    """Forecasts by one of the bases of `weight_table`."""
    slots = features.method.slots
    rows = [weight_table(basis, slots - 1, full[list(group)], 2) for group in groups(plan)]
    depth = features.model.config.depth
    return ForecastTables(features.method, depth, full, np.concatenate(rows))


def rolled(
    features: Features,
    plan: Fitted,
    tables: ForecastTables,
    given: Trajectories,
    fits: bool = False,
) -> tuple[ForecastTables, Float[np.ndarray, "n h w c"]]:
    """Where a plan leads from the noises of trajectories; with `fits`, every row fitted in turn.

    Raises:
      RunError: states that are not finite.
    """
    every, full, weights = groups(plan), tables.full, tables.weights.copy()
    size = min(features.part(features.method.slots, at(plan, group[0])) for group in every)
    cut, times = list(parts(len(given.labels), size)), np.float64(plan.times)
    targets = given.at(times) if fits else None
    states = [State(given.states[0, part], given.labels[part]) for part in cut]
    for group in every:
        slots = slots_of(full[list(group)], features.method.slots).tolist()
        for state in states:
            state.memory = features.memory(len(state.y), at(plan, group[0]))
        for i, slot in zip(group, slots):
            now, length = at(plan, i), np.float32(times[i + 1] - times[i])
            if fits and not full[i]:
                goals = [targets[i + 1, part] for part in cut]
                written = min(features.method.slots, int(full[group.start : i].sum()))
                weights[i] = fitted(features, now, length, states, goals, weights[i], written)
            for state in states:
                if full[i]:
                    given_now = state.x, state.y, now, state.memory
                    v, state.memory = features.full(*given_now, slot)
                else:
                    v = features.cheap(state.x, state.y, now, state.memory, weights[i])
                state.x = state.x + length * v
    ends = np.concatenate([state.x for state in states])
    if not np.isfinite(ends).all():
        raise RunError("states of a plan are not finite: try --dtype=float32 or a lower --cfg")
    return replace(tables, weights=weights), ends


def fitted(
    features: Features,
    now: At,
    length: np.float32,
    states: list[State],
    goals: list[Float[np.ndarray, "n h w c"]],
    prior: Float[np.ndarray, " s"],
    written: int,
) -> Float[np.ndarray, " s"]:
    """The row with which a step of this length leads nearest to the goals.

    Args:
      written: slots of the ring, the first ones.
    """
    row, best, least = prior, prior, np.inf
    for _ in range(TURNS + 1):
        columns, wanted = [], []
        for state, goal in zip(states, goals):
            v, slopes = features.slopes(state.x, state.y, now, state.memory, row)
            columns.append(length * np.float64(slopes[..., :written]).reshape(len(v), -1, written))
            left = np.float64(goal) - state.x - length * np.float64(v)
            wanted.append(left.reshape(len(v), -1))
        here, left = np.concatenate(columns), np.concatenate(wanted)
        if not np.mean(np.square(left)) < least:
            break
        best, least = row, np.mean(np.square(left))
        change = ridge(here, left + here @ (row - prior)[:written])
        # No further than the prior is long: the velocity is linear nearby alone
        change *= min(1, np.linalg.norm(prior) / max(np.linalg.norm(change), 1e-30))
        row = prior + np.pad(change, (0, len(prior) - written))
    return best


def error(features: Features, plan: Fitted, tables: ForecastTables, given: Trajectories) -> float:
    """Distance of the end states from the fine ones, as a share of these (root mean squares)."""
    return distance(rolled(features, plan, tables, given)[1], given)


def _said(
    asked: Asked, full: Bool[np.ndarray, " steps"], errors: dict[str, float], out: Path
) -> str:
    """A row for every plan: steps, full ones among them, error."""
    rows = [["", "steps", "full", "error"]]
    for name, value in errors.items():
        euler = name.startswith("euler")
        steps = name.split()[1] if euler else str(asked.steps)
        rows.append([name, steps, steps if euler else str(asked.full), f"{value:.4f}"])
    best = min(v for k, v in errors.items() if k.startswith(("taylor", "hermite")))
    return (
        f"{table(rows)}\n{errors['plan'] / best:.2f} of the error of the best fixed forecast, on "
        f"held-out noise; full steps: {','.join(map(str, np.flatnonzero(full)))}; the plan is {out}"
    )
