"""The figures of the report, as SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ppflow_jax.report.strip import Strip

Points = Sequence[tuple[int, float]]


def curves(lines: Mapping[str, Points], ylabel: str, *, log: bool = False) -> bytes:
    """One line of (step, value) for every run; one without points keeps its colour from others."""
    figure, axes = _axes(5.2, 3.2)
    for i, (name, points) in enumerate(lines.items()):
        if points:
            marker = "." if len(points) < 20 else None
            axes.plot(*zip(*points), label=name, marker=marker, linewidth=1.3, color=f"C{i}")
    axes.set(xlabel="step", ylabel=ylabel, yscale="log" if log else "linear")
    axes.legend(frameon=False)
    return _svg(figure)


def quality_against_latency(
    lines: Mapping[str, Sequence[tuple[float, float, str]]], ylabel: str
) -> bytes:
    """(seconds per image, quality, what it is) of every evaluation, by run."""
    figure, axes = _axes(7.5, 4.0)
    for name, points in lines.items():
        seconds, values, texts = zip(*sorted(points))
        axes.plot(seconds, values, label=name, marker="o", linewidth=1)
        for x, y, text in zip(seconds, values, texts):
            axes.annotate(text, (x, y), (4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="seconds per image", ylabel=ylabel)
    axes.legend(frameon=False)
    return _svg(figure)


def cost_of_steps(strip: Strip) -> bytes:
    """Tokens and FLOPs of every step over time, with the stage boundaries."""
    figure = Figure(figsize=(9.6, 2.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    giga = [f / 1e9 for f in strip.flops]
    for axes, values, label in ((left, strip.tokens, "tokens"), (right, giga, "GFLOPs")):
        axes.stairs(values, strip.times, fill=True, color="tab:blue", alpha=0.35)
        axes.stairs(values, strip.times, color="tab:blue", linewidth=1.2)
        for i in range(1, len(strip.stages)):
            if strip.stages[i] != strip.stages[i - 1]:
                axes.axvline(strip.times[i], color="tab:red", linestyle="--", linewidth=1)
        axes.set(xlabel="t (0 noise, 1 data)", ylabel=f"{label} per step", xlim=(0, 1))
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    return _svg(figure)


def _axes(width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Text stays text; no date and a fixed salt make the same figure the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ppflow_jax"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
