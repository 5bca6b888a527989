"""The drawings of docs/concepts.md: python -m examples.drawings [FOLDER]."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig, Segment
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.pyramid import PPFLOW3
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated

COLOURS = ("#3f51b5", "#00897b", "#ff8f00")
SIZE = 16  # side of the latent that is drawn
INK = "#455a64"


def main(folder: str = "docs/assets") -> None:
    plt.rcParams |= {"svg.hashsalt": "ppflow_jax", "font.size": 10}
    for draw in (stages, plan, guidance):
        figure = draw()
        figure.savefig(Path(folder, f"{draw.__name__}.svg"), metadata={"Date": None})
        plt.close(figure)


def stages() -> plt.Figure:
    """Three latents, their patches, and the blocks that all of them pass."""
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    axis.set(xlim=(0, 16), ylim=(0, 7.2), aspect="equal")
    axis.axis("off")
    random = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    picture = 1.5 * np.exp(-((np.hypot(x, y) - 4.5) ** 2) / 3) - 0.75
    noise = random.standard_normal((SIZE, SIZE))
    _box(axis, (0.4, 0.5), (15.2, 1.1), "shared blocks: the same weights for all stages", INK)
    for i, (t, left) in enumerate(zip((0.25, 0.65, 0.95), (0.9, 6.4, 11.9))):
        stage = PPFLOW3.stages[i]
        low, high = PPFLOW3.intervals[i]
        side, bottom = 3.2, 3.4
        area = (left, left + side, bottom, bottom + side)
        axis.imshow(t * picture + (1 - t) * noise, cmap="gray", extent=area, vmin=-1.6, vmax=1.6)
        rows, columns = stage.patch
        for k in np.arange(0, SIZE + 1, columns) / SIZE * side:
            axis.plot([left + k] * 2, [bottom, bottom + side], color=COLOURS[i], linewidth=1.1)
        for k in np.arange(0, SIZE + 1, rows) / SIZE * side:
            axis.plot([left, left + side], [bottom + k] * 2, color=COLOURS[i], linewidth=1.1)
        tokens = int(np.prod(PPFLOW3.grid(i, SIZE)))
        title = f"t from {low:g} to {high:g}: {columns}x{rows}, {tokens} tokens"
        axis.text(left + side / 2, bottom + side + 0.2, title, ha="center", color=COLOURS[i])
        _box(axis, (left - 0.5, 2.2), (side + 1, 0.7), "patchify, unpatchify, level", COLOURS[i])
        for low_y, high_y in ((2.9, bottom), (1.6, 2.2)):
            ends = ((left + side / 2, low_y), (left + side / 2, high_y))
            axis.add_patch(
                FancyArrowPatch(*ends, arrowstyle="<|-|>", mutation_scale=9, color=COLOURS[i])
            )
    axis.set(xlim=(0, 16), ylim=(0, 7.2))
    return figure


def plan() -> plt.Figure:
    """Full and forecast evaluations of three plans."""
    rows = {
        "SiT's grid:\nlinspace, 12 points": SamplerConfig("euler", 12, grid="reference"),
        "aligned,\n12 steps": SamplerConfig("euler", 12),
        "aligned, 12 steps,\nforecast, interval 3": SamplerConfig("euler", 12),
    }
    added = ("exact", "exact", "interval=3,order=1")
    figure, axis = plt.subplots(figsize=(8, 2.8), layout="constrained")
    for y, (config, accelerate) in enumerate(zip(rows.values(), added)):
        for t, end, stage, full in _steps(config, accelerate):
            axis.plot([t, end], [-y, -y], color=COLOURS[stage], linewidth=4, alpha=0.35)
            face = COLOURS[stage] if full else "white"
            axis.plot(t, -y, "o", color=COLOURS[stage], markerfacecolor=face, markersize=8)
    for boundary in PPFLOW3.boundaries:
        axis.axvline(boundary, color=INK, linestyle=":", linewidth=1)
        axis.text(boundary, 0.45, "boundary", ha="center", fontsize=8, color=INK)
    axis.set(yticks=-np.arange(3), yticklabels=list(rows), ylim=(-2.6, 0.8), xlim=(-0.03, 1.03))
    axis.set_xlabel("time: noise to data; a dot is an evaluation, an empty one a forecast")
    axis.spines[["top", "right", "left"]].set_visible(False)
    return figure


def guidance() -> plt.Figure:
    """Cost of every step of a guided SiT, and of two levels with a guided fine stage."""
    figure, axes = plt.subplots(1, 3, figsize=(8, 2.8), sharey=True, layout="constrained")
    scales = {
        "SiT, --cfg=3": (3.0, 3.0),
        "2 levels, --cfg=3": (3.0, 3.0),
        "2 levels, --cfg=1,3": (1.0, 3.0),
    }
    for axis, (name, cfg) in zip(axes, scales.items()):
        for k in range(10):
            stage = 0 if k < 5 else 1
            tokens = 1.0 if name.startswith("SiT") or stage else 0.25
            colour = COLOURS[2] if tokens == 1 else COLOURS[0]
            place = (k / 10 + 0.005, 0.09)
            axis.bar(place[0], tokens, place[1], align="edge", color=colour)
            if cfg[stage] != 1:
                marks = dict(facecolor="white", edgecolor=colour, hatch="////", linewidth=1)
                axis.bar(place[0], tokens, place[1], tokens, align="edge", **marks)
        axis.set(title=name, xlim=(0, 1), xlabel="time")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="tokens of a step", yticks=[0, 0.25, 1, 2])
    axes[0].set_yticklabels(["0", "1/4", "1", "2"])
    return figure


def _steps(config: SamplerConfig, accelerate: str) -> list[tuple[float, float, int, bool]]:
    """(start, end, stage, full) of every step of a plan on three levels."""
    model = ModelConfig(pyramid=PPFLOW3, latent_size=SIZE, channels=4, num_classes=10, width=32,
                        depth=2, heads=2)  # fmt: skip
    segments: tuple[Segment, ...] = accelerated(
        config, model, Flow(), AccelerateConfig.parse(accelerate)
    )
    return [
        (s.times[k], s.times[k + 1], s.stages[0], s.method is None or bool(s.full[k]))
        for s in segments
        for k in range(s.steps)
    ]


def _box(
    axis: Axes, corner: tuple[float, float], size: tuple[float, float], text: str, colour: str
) -> None:
    style = "round,pad=0,rounding_size=0.15"
    axis.add_patch(
        FancyBboxPatch(corner, *size, boxstyle=style, facecolor="white", edgecolor=colour)
    )
    middle = (corner[0] + size[0] / 2, corner[1] + size[1] / 2)
    axis.text(*middle, text, ha="center", va="center", color=colour, fontsize=9)


if __name__ == "__main__":
    main(*sys.argv[1:])
