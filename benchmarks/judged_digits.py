"""Digits of trained runs, sampled in so many steps, judged.

    python -m benchmarks.judged_digits --runs=RUN,... --features=FEATURES [--steps=4,20] \
        [--tuned=5,8] [--cfg=2] [--num=1000]

RUN,... are of several training seeds. For every number of Euler steps, and of evaluations of plans
that `tune` fits to a run (kept in it): FLOPs an image, the share of samples that are recognised as
their label (see benchmarks/digits_consistency.py), and the FID in FEATURES (as of `evaluate`), mean
and range over the runs. Samples of one number have the same noise and label in all runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

import ppflow_jax as pf
from benchmarks.digits_consistency import consistency
from benchmarks.settings import spread, tuned_plan
from ppflow_jax.data.images import array_images
from ppflow_jax.data.save import to_uint8
from ppflow_jax.flow.cost import sampling_flops
from ppflow_jax.metrics.evaluator import Evaluator, open_reference
from ppflow_jax.metrics.networks import load_features

HEAD = "| sampled by | MFLOPs an image | recognised, % | FID |\n|---|---|---|---|"


def judge(features: str) -> Callable[[np.ndarray, np.ndarray], tuple[float, float]]:
    """What gives images [N, 8, 8, 1] and labels [N] their per cent recognised and their FID."""
    evaluator = Evaluator(load_features(features, "tf1"), open_reference("digits", None), ("fid",))

    def judged(images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
        pictures = array_images(f"{len(images)} samples", to_uint8(images, "pixels"))
        share = 100 * consistency(np.clip(images, -1, 1), labels)[0]
        return share, float(evaluator(pictures)["metrics"]["fid"])

    return judged


def line(name: str, found: list[tuple[float, ...]]) -> str:
    """Of a table, FLOPs, share and FID of every run."""
    flops, share, fid = zip(*found)
    cells = (name, spread([f / 1e6 for f in flops], ".1f"), spread(share, ".1f"))
    return "| " + " | ".join((*cells, spread(fid, ".2f"))) + " |"


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=lambda text: text.split(","), required=True)
    parser.add_argument("--features", required=True)
    parser.add_argument("--steps", type=numbers, default=[])
    parser.add_argument("--tuned", type=numbers, default=[])
    parser.add_argument("--cfg", type=float, default=2.0)
    parser.add_argument("--num", type=int, default=1000)
    args = parser.parse_args()
    if not args.steps and not args.tuned:
        parser.error("give --steps, --tuned or both")
    judged, labels = judge(args.features), np.arange(args.num, dtype=np.int32) % 10
    found: dict[str, list[tuple[float, ...]]] = {}
    for run in args.runs:
        model = pf.load(run)
        plans = {
            f"Euler {steps}": model.plan(solver="euler", steps=steps, cfg=args.cfg)
            for steps in args.steps
        }
        for count in args.tuned:
            file = Path(run) / f"tuned{count}.json"
            plans[f"tuned plan of {count}"] = tuned_plan(model, file, (args.cfg,), count)
        for name, plan in plans.items():
            images = model.sample(args.num, plan=plan, seed=0, labels=labels).latents
            figures = (sampling_flops(model.config, plan.segments), *judged(images, labels))
            print(f"{run}, {name}: {figures}", flush=True)
            found.setdefault(name, []).append(figures)
    print("\n".join((HEAD, *(line(name, figures) for name, figures in found.items()))))


if __name__ == "__main__":
    main()
