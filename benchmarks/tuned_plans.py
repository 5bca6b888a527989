"""Fitted plans against the fixed solvers with as many evaluations.

    python -m benchmarks.tuned_plans --run=runs/sit@2 --run=runs/l2@1,2 --out=DIR \
        [--evaluations=5,6,8,10,15] [--noises=256] [--norefine]

Every run is given with its guidance scales. Errors are of the end states on held-out noises and
labels, relative to 100 Heun steps. Plans lie in DIR: a killed command continues, and a run is
calibrated once. Writes DIR/errors.md and DIR/errors.png. With --norefine plans are in closed form
and lie beside the others, as -closed. Exit code 0 only if every plan has at most 0.6 of the error
of the best fixed solver.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from absl import flags

from benchmarks.settings import run_and_guidance
from ppflow_jax import cli

_RUN = flags.DEFINE_multi_string("run", None, "RUN@GUIDANCE, as runs/l2@1,2.")
_OUT = flags.DEFINE_string("out", None, "Folder of plans, table and figure.")
_EVALUATIONS = flags.DEFINE_list("evaluations", ["5", "6", "8", "10", "15"], "Budgets.")
_NOISES = flags.DEFINE_integer("noises", 256, "Trajectories that plans are fitted to.")
_REFINE = flags.DEFINE_bool("refine", True, "Refine the plans by gradients.")
BOUND = 0.6


def main() -> None:
    import ppflow_jax as pf
    from ppflow_jax.devices.host_memory import keep_scratch
    from ppflow_jax.generate.plan_file import PlanFile
    from ppflow_jax.tune.command import Asked, tune

    keep_scratch()
    out, rows = Path(_OUT.value), []
    kind = "" if _REFINE.value else "-closed"
    for text in _RUN.value:
        run, cfg, name = run_and_guidance(text)
        model, folder = pf.load(run), out / name
        for budget in map(int, _EVALUATIONS.value):
            file, start = folder / f"{budget}{kind}.json", time.monotonic()
            if not file.exists():
                asked = Asked(str(file), cfg, evaluations=budget, noises=_NOISES.value)
                tune(model, replace(asked, refine=_REFINE.value))
                print(f"{text} {budget}: {time.monotonic() - start:.0f} s", flush=True)
            plan = PlanFile.read(file)
            steps = "+".join(map(str, plan.fitted.counts.values()))
            rows.append((text, budget, steps, plan.made["held_out_errors"]))
    (out / f"errors{kind}.md").write_text(_table(rows))
    _figure(rows, out / f"errors{kind}.png")
    print(_table(rows))
    worst = max(errors["plan"] / _best(errors)[1] for *_, errors in rows)
    print(f"worst {worst:.2f} of the best fixed solver's error, at most {BOUND}")
    sys.exit(int(worst > BOUND))


def _best(errors: dict[str, float]) -> tuple[str, float]:
    fixed = {name: value for name, value in errors.items() if name != "plan"}
    return min(fixed.items(), key=lambda item: item[1])


def _table(rows: list) -> str:
    names = [name for name in rows[0][3] if name != "plan"]
    head = ["run", "evaluations", *names, "plan", "its steps", "of the best"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for run, budget, steps, errors in rows:
        values = [f"{errors[name]:.4f}" for name in (*names, "plan")]
        share = f"{errors['plan'] / _best(errors)[1]:.2f} ({_best(errors)[0]})"
        lines.append("| " + " | ".join([Path(run).name, str(budget), *values, steps, share]) + " |")
    return "\n".join(lines) + "\n"


def _figure(rows: list, path: Path) -> None:
    import matplotlib.pyplot as plt

    runs = list(dict.fromkeys(run for run, *_ in rows))
    figure, axes = plt.subplots(1, len(runs), figsize=(4.5 * len(runs), 4), squeeze=False)
    for axis, run in zip(axes[0], runs):
        mine = [(budget, errors) for name, budget, _, errors in rows if name == run]
        for solver in mine[0][1]:
            points = [(budget, errors[solver]) for budget, errors in mine]
            width = 2.5 if solver == "plan" else 1
            axis.plot(*zip(*points), marker="o", markersize=3, linewidth=width, label=solver)
        axis.set(yscale="log", xlabel="evaluations", title=Path(run).name)
    axes[0][0].set_ylabel("error on held-out noise")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    cli.run(main, required=("run", "out"))
