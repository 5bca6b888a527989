"""The sampling plan: every time, stage and guidance decision, made in NumPy before sampling."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.solvers import DIFFUSIONS, LAST_STEPS, ODE_SOLVERS, SDE_SOLVERS
from ppflow_jax.pyramid import Pyramid

GRIDS = ("aligned", "reference")
ADAPTIVE = "dopri5"
SOLVERS = (*ODE_SOLVERS, ADAPTIVE, *SDE_SOLVERS)


@dataclass(frozen=True)
class SamplerConfig:
    """How to integrate from noise to data.

    Attributes:
      solver: one of `SOLVERS`; `sde-euler` and `sde-heun` are stochastic, `dopri5` adaptive.
      steps: intervals on the aligned grid; points of `linspace(0, 1, steps)` on the reference
        grid, which makes steps - 1 intervals. The adaptive solver chooses its own steps.
      grid: `aligned` makes every stage boundary a grid point, and a step belongs wholly to one
        stage; `reference` is the grid of the PyTorch code, where the stage follows the time of
        every evaluation.
      cfg: guidance scale of every stage, or one for all. 1 does not evaluate the null class.
      cfg_channels: 0 guides all channels; n > 0 only the first n (the PyTorch code guides 3).
      rtol, atol: of the adaptive solver.
      diffusion, diffusion_norm: SDE diffusion form and its factor (SiT, Sec. 2.4).
      last_step, last_step_size: how the SDE covers the last piece of time, up to t = 1.

    Raises:
      InputError: a value out of its range.
    """

    solver: str = "heun"
    steps: int = 50
    grid: str = "aligned"
    cfg: tuple[float, ...] = (1.0,)
    cfg_channels: int = 0
    rtol: float = 1e-3
    atol: float = 1e-6
    diffusion: str = "sigma"
    diffusion_norm: float = 1.0
    last_step: str = "mean"
    last_step_size: float = 0.04

    def __post_init__(self):
        for name, value, known in (
            ("solver", self.solver, SOLVERS),
            ("grid", self.grid, GRIDS),
            ("diffusion", self.diffusion, tuple(DIFFUSIONS)),
            ("last_step", self.last_step, LAST_STEPS),
        ):
            if value not in known:
                raise InputError(f"unknown {name} {value!r}: one of {', '.join(known)}")
        if self.steps < 1 or (self.grid == "reference" and self.steps < 2):
            raise InputError(
                f"steps must be at least {2 if self.grid == 'reference' else 1} "
                f"on the {self.grid} grid, got {self.steps}"
            )
        if not all(np.isfinite(self.cfg)):
            raise InputError(f"guidance scales must be finite numbers, got {self.cfg}")
        if not 0 < self.last_step_size < 1:
            raise InputError(f"last_step_size must be in (0, 1), got {self.last_step_size}")

    @property
    def stochastic(self) -> bool:
        return self.solver in SDE_SOLVERS

    def scales(self, pyramid: Pyramid) -> tuple[float, ...]:
        """Guidance scale of every stage.

        Raises:
          InputError: neither one scale nor one for every stage.
        """
        if len(self.cfg) not in (1, len(pyramid)):
            raise InputError(
                f"{len(self.cfg)} guidance scales for a model of {len(pyramid)} stage(s): "
                f"give 1 or {len(pyramid)}, e.g. --cfg={','.join(['1.5'] * len(pyramid))}"
            )
        return self.cfg if len(self.cfg) == len(pyramid) else self.cfg * len(pyramid)


@dataclass(frozen=True)
class Segment:
    """Consecutive steps that share every static fact.

    Attributes:
      kind: `ode`, `sde`, `last` (the SDE's noise-free last step) or `adaptive`.
      stages: stage of each model evaluation within a step.
      scales: guidance scale of each evaluation.
      times: grid points, one more than steps; float32 values.
    """

    kind: str
    stages: tuple[int, ...]
    scales: tuple[float, ...]
    times: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def guided(self) -> tuple[bool, ...]:
        """Whether each evaluation also evaluates the null class."""
        return tuple(s != 1.0 for s in self.scales)


def time_range(config: SamplerConfig, flow: Flow) -> tuple[float, float]:
    """Times covered by the grid; an SDE leaves its last step to `last_step`."""
    lo, hi = flow.sample_interval()
    if not config.stochastic:
        return lo, hi
    if config.diffusion == "sbdm":
        lo = max(lo, 1e-3)  # its diffusion is infinite at t = 0
    if config.last_step != "none":
        hi = 1 - config.last_step_size
    elif flow.path == "vp" or config.diffusion == "sbdm":
        hi = min(hi, 1 - 1e-3)
    return lo, hi


def aligned_grid(lo: float, hi: float, steps: int, pyramid: Pyramid) -> np.ndarray:
    """float32 grid on [lo, hi] with `steps` intervals and every boundary inside as a point.

    Intervals are shared among the stages by duration (largest remainder, at least one each)
    and are equal within a stage.

    Raises:
      InputError: fewer steps than stages.
    """
    ends = [lo, *(b for b in pyramid.boundaries if lo < b < hi), hi]
    durations = np.diff(ends)
    if steps < len(durations):
        raise InputError(
            f"{steps} step(s) for {len(durations)} stages on the aligned grid: "
            f"give at least {len(durations)}"
        )
    ideal = durations / (hi - lo) * steps
    counts = np.maximum(np.floor(ideal + 1e-9).astype(int), 1)
    while counts.sum() < steps:
        counts[np.argmax(ideal - counts)] += 1
    while counts.sum() > steps:
        counts[np.argmax(np.where(counts > 1, counts - ideal, -np.inf))] -= 1
    pieces = [np.linspace(a, b, n + 1)[:-1] for a, b, n in zip(ends, ends[1:], counts)]
    return np.concatenate([*pieces, [hi]]).astype(np.float32)


def reference_grid(lo: float, hi: float, points: int) -> np.ndarray:
    """`torch.linspace(lo, hi, points)` in float32, to the last bit.

    It counts from both ends with a fused multiply-add; NumPy's differs by an ulp, which can put
    a point on the other side of a stage boundary.
    """
    lo, hi = np.float32(lo), np.float32(hi)
    step, i = np.float64((hi - lo) / np.float32(points - 1)), np.arange(points)
    ends = np.where(i < points // 2, lo + step * i, hi - step * (points - 1 - i))
    return ends.astype(np.float32)


def plan(config: SamplerConfig, pyramid: Pyramid, flow: Flow) -> tuple[Segment, ...]:
    """Segments of a run, in order.

    For the adaptive solver there is one per stage; a stochastic one with a last step has that
    step as its last segment.

    Raises:
      InputError: guidance scales or steps that do not fit the pyramid.
    """
    scales = config.scales(pyramid)
    lo, hi = time_range(config, flow)
    if config.solver == ADAPTIVE:
        ends = np.float32([lo, *(b for b in pyramid.boundaries if lo < b < hi), hi])
        stages = [pyramid.stage_at((a + b) / 2) for a, b in zip(ends, ends[1:])]
        return tuple(
            Segment("adaptive", (s,), (scales[s],), (float(a), float(b)))
            for s, a, b in zip(stages, ends, ends[1:])
        )
    nodes = (ODE_SOLVERS | SDE_SOLVERS)[config.solver].nodes
    if config.grid == "aligned":
        times = aligned_grid(lo, hi, config.steps, pyramid)
    else:
        times = reference_grid(lo, hi, config.steps)

    def step_stages(t0: np.float32, t1: np.float32) -> tuple[int, ...]:
        if config.grid == "aligned":
            return (pyramid.stage_at((t0 + t1) / 2),) * len(nodes)
        return tuple(pyramid.stage_at(t0 + np.float32(node) * (t1 - t0)) for node in nodes)

    steps = [(step_stages(a, b), float(a), float(b)) for a, b in zip(times, times[1:])]
    kind = "sde" if config.stochastic else "ode"
    segments = []
    for stages, group in itertools.groupby(steps, key=lambda s: s[0]):
        group = list(group)
        points = (group[0][1], *(s[2] for s in group))
        segments.append(Segment(kind, stages, tuple(scales[s] for s in stages), points))
    if config.stochastic and config.last_step != "none":
        stage = pyramid.stage_at(times[-1])
        last = (float(times[-1]), float(times[-1]) + config.last_step_size)
        segments.append(Segment("last", (stage,), (scales[stage],), last))
    return tuple(segments)


def evaluations(segments: tuple[Segment, ...]) -> int:
    """NFE of a fixed-grid plan; a guided evaluation counts once."""
    return sum(s.steps * len(s.stages) for s in segments)
