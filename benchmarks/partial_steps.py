"""Steps that compute a part of the tokens or of the scores, beside simply fewer steps.

    python -m benchmarks.partial_steps --run=RUN [--steps=24] [--cfg=2] [--batch=64] [--rounds=7]

RUN is a trained workdir. Every row is a plan: its FLOPs and its time (all rows in turn in every
round, the median of the ratio to the first row in the same round) as shares of so many Euler steps,
and its error against 250 Heun steps from the same noise (relative root mean square).
"""

from __future__ import annotations

import argparse

import jax
import numpy as np

import ppflow_jax as pf
from benchmarks.fast_sampling import timed
from ppflow_jax.devices.host_memory import keep_scratch
from ppflow_jax.flow.cost import sampling_flops
from ppflow_jax.flow.sampler import image_noise

TRACED = 64  # images whose error is measured


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
    parser.add_argument("--run", required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--cfg", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    keep_scratch()
    model = pf.load(args.run)
    config = model.config

    def run_of(settings: dict, batch: int):
        plan = model.plan(cfg=args.cfg, **settings)
        sampler = plan.sampler()
        noise = image_noise(0, np.arange(batch, dtype=np.int32), config.shape)[0]
        labels = np.arange(batch, dtype=np.int32) % config.num_classes
        return plan, lambda: sampler(model.params, noise, labels)

    with jax.default_matmul_precision("highest"):
        exact = np.asarray(run_of({"solver": "heun", "steps": 250}, TRACED)[1]())
        plans, runs, errors = {}, {}, {}
        for name, settings in rows(args.steps, config.channels).items():
            plans[name], runs[name] = run_of(settings, args.batch)
            away = np.asarray(run_of(settings, TRACED)[1]()) - exact
            errors[name] = float(np.sqrt(np.mean(away**2) / np.mean(exact**2)))
        base = next(iter(runs))
        shares = timed(runs, base, args.rounds)
    print("| plan | FLOPs | time | error |\n|---|---|---|---|")
    whole = sampling_flops(config, plans[base].segments)
    for name, plan in plans.items():
        flops = sampling_flops(config, plan.segments) / whole
        print(f"| {name} | {flops:.1%} | {shares[name]:.1%} | {errors[name]:.4f} |")


if __name__ == "__main__":
    main()
