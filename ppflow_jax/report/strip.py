"""One sample on its way through the stages."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from ppflow_jax.api.inputs import check_unconditional
from ppflow_jax.api.load import load
from ppflow_jax.autoencoders.decode import Decoder
from ppflow_jax.flow.path import Flow, clean_from
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.report.run import Run

PICTURES = 12


@dataclass(frozen=True)
class Strip:
    """A trajectory of n Euler steps.

    Attributes:
      label, cfg: class and guidance scale of every stage.
      times: n + 1 grid points.
      stages, tokens, flops: of every step; a guided step counts twice the FLOPs.
      shown: indices of the grid points with pictures, every stage boundary among them.
      states, estimates: pictures of x_t and of the clean image that its velocity points at.
    """

    label: int
    cfg: tuple[float, ...]
    times: tuple[float, ...]
    stages: tuple[int, ...]
    tokens: tuple[int, ...]
    flops: tuple[int, ...]
    shown: tuple[int, ...]
    states: UInt8[np.ndarray, "k h w c"]
    estimates: UInt8[np.ndarray, "k h w c"]


def make_strip(run: Run, decoder: Decoder, *, label: int, seed: int, steps: int) -> Strip:
    """Image 0 of `seed`, with the guidance of the run's configuration.

    Raises:
      InputError: weights that cannot be read, or fewer steps than stages.
    """
    card, experiment = run.card, run.card.experiment or {}
    cfg = tuple(experiment.get("sample", {}).get("cfg", (1.0,)))
    model = load(run.checkpoint)
    check_unconditional(model.config, "the report")
    plan = model.plan(solver="euler", steps=steps, cfg=cfg)
    path = model.trajectory(1, plan=plan, labels=label, seed=seed)[:, 0]

    segments, times = plan.segments, plan.times
    stages = tuple(s.stages[0] for s in segments for _ in range(s.steps))
    rows = [(forward_flops(card.model, i), card.model.pyramid.grid(i, card.model.latent_size))
            for i in range(len(card.model.pyramid))]  # fmt: skip
    guided = [s.guided[0] for s in segments for _ in range(s.steps)]
    shown = _shown(stages)
    return Strip(
        label,
        plan.config.scales(card.model.pyramid),
        times,
        stages,
        tuple(int(np.prod(rows[s][1])) for s in stages),
        tuple(rows[s][0] * (1 + g) for s, g in zip(stages, guided)),
        shown,
        decoder.pictures(path[list(shown)]),
        decoder.pictures(_estimates(card.flow, path, np.float32(times))[list(shown)]),
    )


def _shown(stages: tuple[int, ...]) -> tuple[int, ...]:
    """About `PICTURES` grid points: both ends, every boundary, the rest evenly spread."""
    last = len(stages)
    boundaries = {i for i in range(1, last) if stages[i] != stages[i - 1]}
    spread = np.linspace(0, last, max(2, PICTURES - len(boundaries))).round().astype(int)
    return tuple(sorted(boundaries | set(spread.tolist())))


def _estimates(
    flow: Flow, states: Float[np.ndarray, "n h w c"], times: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "n h w c"]:
    """Clean image x1 of x = alpha x1 + sigma x0 and its velocity; the last state is its own."""
    velocity = np.diff(states, axis=0) / np.diff(times)[:, None, None, None]
    clean = clean_from(flow, *map(jnp.asarray, (velocity, states[:-1], times[:-1])))
    return np.concatenate([clean, states[-1:]])
