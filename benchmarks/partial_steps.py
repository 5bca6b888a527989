"""Steps that compute a part of the tokens or of the scores, beside simply fewer steps.

    python -m benchmarks.partial_steps --runs=RUN,... [--steps=24] [--cfg=2] [--batch=64] \
        [--rounds=7]

RUN is a trained workdir; several are of several training seeds. Every row is a plan: its FLOPs and
its time (of the first run; all rows in turn in every round, the median of the ratio to the first
row in the same round) as shares of so many Euler steps, and its error against 250 Heun steps from
the same noise (relative root mean square; mean and range over the runs). Plans that are fitted to
a run are kept in it.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import jax
import numpy as np

import ppflow_jax as pf
from benchmarks.fast_sampling import timed
from benchmarks.settings import spread, tuned_plan
from ppflow_jax.devices.host_memory import keep_scratch
from ppflow_jax.flow.cost import sampling_flops
from ppflow_jax.flow.sampler import image_noise
from ppflow_jax.generate.plan import Plan

TRACED = 64  # images whose error is measured
TUNED = (5, 8)  # evaluations of plans that are fitted to the run


def rows(steps: int, channels: int) -> dict[str, dict]:
    """Settings of `Model.plan` by name; the first is the base."""
    metric = "norm" if channels == 1 else "std"
    found: dict[str, dict] = {f"Euler {steps}": {"solver": "euler", "steps": steps}}
    for n in (3 * steps // 4, 2 * steps // 3, steps // 2):
        found[f"Euler {n}"] = {"solver": "euler", "steps": n}
    found[f"AB2 {steps // 2}"] = {"solver": "ab2", "steps": steps // 2}
    partly = {
        f"RAS, {share:.0%} of the tokens{more}": f"ras={metric},ras.share={share},{settings}"
        for share in (0.5, 0.25)
        for more, settings in {
            "": "ras.warmup=3,ras.interval=6",
            ", smallest left out": "ras.warmup=3,ras.interval=6,ras.high=0",
        }.items()
    }
    for share in (0.5, 0.25):
        settings = "rettention.warmup=3,rettention.interval=5"
        partly[f"Re-ttention, {share:.0%} of the keys"] = f"rettention={share},{settings}"
    for name, text in partly.items():
        found[name] = {"solver": "euler", "steps": steps, "accelerate": text}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=lambda text: text.split(","), required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--cfg", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    keep_scratch()
    errors: dict[str, list[float]] = {}
    times: dict[str, float] = {}
    flops: dict[str, float] = {}
    with jax.default_matmul_precision("highest"):
        for run in args.runs:
            model = pf.load(run)
            plans = _plans(model, run, args)
            samplers = {name: plan.sampler() for name, plan in plans.items()}
            inputs = _inputs(model, TRACED)
            fine = model.plan(solver="heun", steps=250, cfg=args.cfg).sampler()
            exact = np.asarray(fine(*inputs))
            for name, sampler in samplers.items():
                away = np.asarray(sampler(*inputs)) - exact
                error = float(np.sqrt(np.mean(away**2) / np.mean(exact**2)))
                errors.setdefault(name, []).append(error)
            if times:
                continue
            inputs, base = _inputs(model, args.batch), next(iter(plans))
            calls = {name: partial(sampler, *inputs) for name, sampler in samplers.items()}
            times = timed(calls, base, args.rounds)
            whole = sampling_flops(model.config, plans[base].segments)
            for name, plan in plans.items():
                flops[name] = sampling_flops(model.config, plan.segments) / whole
    print("| plan | FLOPs | time | error |\n|---|---|---|---|")
    for name, found in errors.items():
        print(f"| {name} | {flops[name]:.1%} | {times[name]:.1%} | {spread(found, '.4f')} |")


def _plans(model: pf.Model, run: str, args: argparse.Namespace) -> dict[str, Plan]:
    found = rows(args.steps, model.config.channels)
    plans = {name: model.plan(cfg=args.cfg, **settings) for name, settings in found.items()}
    for count in TUNED:
        file = Path(run) / f"tuned{count}.json"
        plans[f"tuned plan of {count}"] = tuned_plan(model, file, (args.cfg,), count)
    return plans


def _inputs(model: pf.Model, batch: int) -> tuple:
    """Parameters, noise [batch, ...] and labels [batch]."""
    noise = image_noise(0, np.arange(batch, dtype=np.int32), model.config.shape)[0]
    return model.params, noise, np.arange(batch, dtype=np.int32) % model.config.num_classes


if __name__ == "__main__":
    main()
