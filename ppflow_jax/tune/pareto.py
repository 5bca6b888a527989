"""What every budget buys: cost and error of plans whose steps each have their best patch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from ppflow_jax.console import progress, table
from ppflow_jax.flow.fitted import Fitted
from ppflow_jax.tune.calibrate import Trajectories
from ppflow_jax.tune.fit import Field, closed_form, error
from ppflow_jax.tune.patches import assigned, pyramid_of, with_patches

BUDGETS = 10  # from the coarsest patch throughout to the finest

Point = dict[str, Any]  # "cost" of an image, "error" on held-out noise, "pyramid": its text
Front = dict[
    str, Any
]  # "points", the cheapest first; "own": of the model's stages; "unit" of costs


def front_of(
    field: Field,
    cfg: Sequence[float],
    times: Float[np.ndarray, " points"],
    errors: Float[np.ndarray, "steps stages"],
    costs: Float[np.ndarray, "steps stages"],
    trajectories: tuple[Trajectories, Trajectories],
) -> list[Point]:
    """Plans of one calibration, fitted in closed form, that no cheaper one is as good as.

    Args:
      errors, costs: of every step with each patch, as in `patches.assigned`.
      trajectories: to fit to, and held out.
    """
    fit, held_out = trajectories
    limits = np.geomspace(costs[:, 0].sum(), costs[:, -1].sum(), BUDGETS)
    tried = dict.fromkeys(assigned(errors, costs, float(limit))[0] for limit in limits)
    found = []
    with progress(len(tried), 0, "plan", "budgets") as bar:
        for stages in tried:
            plan, _ = closed_form(field, with_patches(field, cfg, times, stages), fit)
            cost = float(sum(costs[i, s] for i, s in enumerate(stages)))
            found.append(point(field, plan, cost, held_out))
            bar.update(1)
    best = np.minimum.accumulate([p["error"] for p in found])
    return [p for p, least in zip(found, best) if p["error"] == least]


def point(field: Field, plan: Fitted, cost: float, held_out: Trajectories) -> Point:
    text = str(pyramid_of(field, plan))
    return {"cost": cost, "error": error(field, plan, held_out), "pyramid": text}


def text_of(front: Front) -> str:
    """A table, with pyramids to paste into a config."""
    rows = [[front["unit"], "error", "config.model.pyramid"]]
    rows += [[f"{p['cost']:.4g}", f"{p['error']:.4f}", p["pyramid"]] for p in front["points"]]
    return table(rows)


def figure_of(front: Front, kind: str = "png") -> bytes:
    """Cost against error, and the plan of the model's own stages beside it.

    Args:
      kind: of the file, png or svg.
    """
    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    axes, points, own = figure.subplots(), front["points"], front["own"]
    axes.plot([p["cost"] for p in points], [p["error"] for p in points], marker="o", linewidth=1.3)
    for p in points:
        given = {"textcoords": "offset points", "fontsize": 7, "rotation": 20}
        axes.annotate(p["pyramid"], (p["cost"], p["error"]), (4, 4), **given)
    axes.plot([own["cost"]], [own["error"]], "r*", markersize=11, label="the model's own stages")
    axes.set(xlabel=front["unit"], ylabel="error on held-out noise", xscale="log", yscale="log")
    axes.margins(x=0.15, y=0.15)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    # No date and a fixed salt make the same figure the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ppflow_jax"}):
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()
