"""Digits of trained runs, judged by their pixels.

    python -m benchmarks.pixel_distance --runs=RUN,... [--steps=4] [--cfg=2] [--num=1000] \
        [--seeds=3]

For each run and noise seed: the share of samples that are recognised as their label (see
benchmarks/digits_consistency.py) and the Fréchet distance of the 64 pixels to all digits. Samples
of one number and seed have the same noise and label in all runs.
"""

from __future__ import annotations

import argparse

import numpy as np

import ppflow_jax as pf
from benchmarks.digits_consistency import consistency
from ppflow_jax.data.sources import digits
from ppflow_jax.metrics.frechet import frechet_distance
from ppflow_jax.metrics.moments import Statistics


def judged(images: np.ndarray, labels: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Share recognised, and the distance."""
    images = np.clip(images, -1, 1)
    pixels = [np.float64(x).reshape(len(x), -1) for x in (images, real)]
    sets = [Statistics(x.mean(axis=0), np.cov(x.T), len(x)) for x in pixels]
    return consistency(images, labels)[0], frechet_distance(*sets).distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=lambda text: text.split(","), required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cfg", type=float, default=2.0)
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    real, labels = digits().x, np.arange(args.num, dtype=np.int32) % 10
    print("| run | seed | recognised | Fréchet distance |\n|---|---|---|---|")
    for run in args.runs:
        model = pf.load(run)
        plan = model.plan(solver="euler", steps=args.steps, cfg=args.cfg)
        for seed in range(args.seeds):
            images = model.sample(args.num, plan=plan, seed=seed, labels=labels).latents
            share, distance = judged(images, labels, real)
            print(f"| {run} | {seed} | {share:.1%} | {distance:.3f} |", flush=True)


if __name__ == "__main__":
    main()
