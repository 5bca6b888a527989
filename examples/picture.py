"""Tokens against time beside samples, the picture of the README, from a run on digits.

make demo
python -m examples.picture runs/digits docs/assets/pyramid.png
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image

import ppflow_jax as pf

SHOWN = (0.0, 0.25, 0.5, 0.75, 1.0)
COARSE, FINE = "#3f51b5", "#ff8f00"
LABEL = 3


def main(run: str, file: str) -> None:
    model = pf.load(run)
    plan = model.plan(steps=20, cfg=2, solver="euler")
    states = model.trajectory(1, plan=plan, labels=LABEL, seed=0)[:, 0]
    samples = model.sample(80, plan=model.plan(steps=20, cfg=2), seed=1)

    figure = plt.figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3, 1.9))
    axes = left.subplot_mosaic("abcde;ttttt", height_ratios=(1.25, 1))
    for axis, t in zip((axes[name] for name in "abcde"), SHOWN):
        point = int(np.abs(np.array(plan.times) - t).argmin())
        latent_with_patches(axis, model, states[point], plan.times[point])
    tokens_against_time(axes["t"], model)
    grid = right.subplots()
    pictures = np.pad(samples.pictures[..., 0], ((0, 0), (1, 1), (1, 1)))
    rows = pictures.reshape(8, 10, *pictures.shape[1:]).transpose(0, 2, 1, 3)
    grid.imshow(rows.reshape(-1, 10 * pictures.shape[2]), cmap="gray")
    grid.set(title="samples, one class a column", xticks=[], yticks=[])
    figure.savefig(file, dpi=110)
    # A palette makes the file a third of its size.
    Image.open(file).convert("RGB").quantize(128).save(file, optimize=True)


def colour(model: pf.Model, stage: int) -> tuple[float, ...] | str:
    return FINE if stage == len(model.config.pyramid) - 1 else COARSE


def latent_with_patches(axis: Axes, model: pf.Model, state: np.ndarray, t: float) -> None:
    pyramid, size = model.config.pyramid, model.config.latent_size
    stage = pyramid.stage_at(t)
    rows, columns = pyramid.stages[stage].patch
    axis.imshow(state[..., 0], cmap="gray", vmin=-1.2, vmax=1.2)
    for line in np.arange(0, size + 1, rows) - 0.5:
        axis.axhline(line, color=colour(model, stage), linewidth=1.6)
    for line in np.arange(0, size + 1, columns) - 0.5:
        axis.axvline(line, color=colour(model, stage), linewidth=1.6)
    axis.set_title(f"t = {t:.2f}\n{np.prod(pyramid.grid(stage, size))} tokens", fontsize=9)
    axis.set(xticks=[], yticks=[], xlim=(-0.6, size - 0.4), ylim=(size - 0.4, -0.6))


def tokens_against_time(axis: Axes, model: pf.Model) -> None:
    pyramid, size = model.config.pyramid, model.config.latent_size
    tokens = [int(np.prod(pyramid.grid(i, size))) for i in range(len(pyramid))]
    for stage, (low, high) in enumerate(pyramid.intervals):
        axis.fill_between([low, high], tokens[stage], color=colour(model, stage), alpha=0.85)
    axis.plot([0, 1], [tokens[-1]] * 2, color="black", linestyle=":", linewidth=1.2)
    axis.text(0.01, tokens[-1] * 1.04, "SiT: all tokens at all times", fontsize=9)
    axis.set(xlim=(0, 1), ylim=(0, tokens[-1] * 1.3), yticks=[0, *tokens], ylabel="tokens")
    axis.set_xlabel("time: noise to data")
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main(*sys.argv[1:])
