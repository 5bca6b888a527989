"""What `tune` chooses against what a person would, at the same FLOPs: steps a stage, and patches.

    python -m benchmarks.hand_made --run=runs/l2@1,2 --run=runs/l3@1,2,2 --out=DIR
    python -m benchmarks.hand_made --run=runs/l3_all_times@1,2,2 --patches --out=DIR

A hand-made allocation shares 6, 8 or 10 steps by the duration of the stages, equally, or two or
three times as many for the finest or the coarsest as for each of the others. Hand-made patches are
12 equal steps that change from every patch to every finer one at 0.25, 0.5 or 0.75. Each is fitted
in closed form; so is what `tune --flops` chooses with just its cost, of the same trajectories.
Errors are of the end states on held-out noises and labels, relative to 100 Heun steps. Writes
DIR/allocations.md or DIR/patches.md. Exit code 0 only if no choice is worse than what was made by
hand.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from benchmarks.settings import run_and_guidance
from ppflow_jax import cli

if TYPE_CHECKING:
    from ppflow_jax.tune.asked import Asked
    from ppflow_jax.tune.calibrate import Trajectories
    from ppflow_jax.tune.fit import Field

_RUN = flags.DEFINE_multi_string("run", None, "RUN@GUIDANCE, as runs/l2@1,2.")
_OUT = flags.DEFINE_string("out", None, "Folder of trajectories and table.")
_PATCHES = flags.DEFINE_bool("patches", False, "Of steps, instead of steps a stage.")
_NOISES = flags.DEFINE_integer("noises", 256, "Trajectories that plans are fitted to.")

STEPS, PATCHED = (6, 8, 10), 12
CHANGES = (0.25, 0.5, 0.75)
Choice = tuple[int, ...]


def main() -> None:
    import ppflow_jax as pf
    from ppflow_jax.devices.host_memory import keep_scratch
    from ppflow_jax.tune.asked import Asked
    from ppflow_jax.tune.fit import Field

    keep_scratch()
    out, rows = Path(_OUT.value), []
    out.mkdir(parents=True, exist_ok=True)
    compared = _patches if _PATCHES.value else _allocations
    for text in _RUN.value:
        run, cfg, folder = run_and_guidance(text)
        model = pf.load(run)
        asked = Asked(
            str(out / folder / "plan.json"), cfg,
            flops=1.0, noises=_NOISES.value, choose_patches=_PATCHES.value,
        )  # fmt: skip
        both = asked.trajectories(model, asked.scales(model), asked.target())
        rows += [(text, *found) for found in sorted(compared(Field(model), asked, *both))]
        print(f"{text}: compared", flush=True)
    text = _table(rows)
    (out / ("patches.md" if _PATCHES.value else "allocations.md")).write_text(text)
    print(text)
    worst = max(ours / theirs for *_, theirs, ours in rows)
    print(f"worst {worst:.3f} of the error of what was made by hand, at most 1")
    sys.exit(int(worst > 1))


def _allocations(
    field: Field, asked: Asked, fit: Trajectories, held_out: Trajectories
) -> Iterator[tuple[Any, ...]]:
    """(FLOPs, by hand, chosen, their errors) of each allocation by hand."""
    from ppflow_jax.tune.allocate import best_allocation, start_of
    from ppflow_jax.tune.command import budget_of
    from ppflow_jax.tune.fit import closed_form, error

    cfg = asked.scales(field.model)
    _, whole = budget_of(field, cfg, asked)
    for counts in _shares(field.model.config.pyramid):
        budget = replace(whole, limit=whole.of(counts))
        by_hand = closed_form(field, start_of(field, cfg, counts), fit)[0]
        chosen = best_allocation(field, cfg, budget, fit)
        names = ["+".join(map(str, plan.counts.values())) for plan in (by_hand, chosen)]
        errors = [error(field, plan, held_out) for plan in (by_hand, chosen)]
        yield budget.limit, *names, *errors


def _shares(pyramid: Any) -> list[Choice]:
    """Steps a stage, by hand."""
    stages = len(pyramid)
    weights = [[end - start for start, end in pyramid.intervals], [1.0] * stages]
    for times, place in itertools.product((2.0, 3.0), (0, -1)):
        weights.append([1.0] * stages)
        weights[-1][place] = times
    found = {}
    for steps, share in itertools.product(STEPS, weights):
        ends = np.rint(np.cumsum(share) / sum(share) * steps).astype(int)
        counts = np.diff([0, *ends])
        if min(counts) > 0:
            found[tuple(counts.tolist())] = None
    return list(found)


def _patches(
    field: Field, asked: Asked, fit: Trajectories, held_out: Trajectories
) -> Iterator[tuple[Any, ...]]:
    """(FLOPs, by hand, chosen, their errors) of each pyramid by hand."""
    from ppflow_jax.tune.command import budget_of
    from ppflow_jax.tune.fit import closed_form, error
    from ppflow_jax.tune.patches import (
        assigned,
        fitted_patches,
        patch_errors,
        pyramid_of,
        scales_at,
        with_patches,
    )

    cfg = asked.scales(field.model)
    cost, _ = budget_of(field, cfg, asked)
    times = np.linspace(fit.times[0], fit.times[-1], PATCHED + 1)
    times = np.float32(times).astype(float)
    errors, scales = patch_errors(field, cfg, times, fit), scales_at(field, cfg, times)
    costs = np.array([[cost(stage, scale) for stage in range(len(cfg))] for scale in scales])
    for patches in _changing(times, len(cfg)):
        limit = float(sum(costs[i, stage] for i, stage in enumerate(patches)))
        by_hand = closed_form(field, with_patches(field, cfg, times, patches), fit)[0]
        chosen = fitted_patches(field, cfg, times, assigned(errors, costs, limit), fit)[0]
        plans = by_hand, chosen
        names = [str(pyramid_of(field, plan)) for plan in plans]
        yield limit, *names, *(error(field, plan, held_out) for plan in plans)


def _changing(times: np.ndarray, stages: int) -> list[Choice]:
    """The stage whose patch every step has, by hand."""
    found = {}
    for levels in range(1, stages + 1):
        for patches in itertools.combinations(range(stages), levels):
            for ends in itertools.combinations(CHANGES, levels - 1):
                places = np.searchsorted(ends, times[:-1] + 1e-6)
                found[tuple(patches[place] for place in places)] = None
    return list(found)


def _table(rows: list[tuple[Any, ...]]) -> str:
    head = ("run", "of SiT's FLOPs", "by hand", "error", "chosen", "error", "ratio")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for run, cost, by_hand, chosen, theirs, ours in rows:
        lines.append(
            f"| {run} | {cost:.1%} | {by_hand} | {theirs:.4f} | {chosen} | {ours:.4f} | "
            f"{ours / theirs:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main, required=("run", "out"))
