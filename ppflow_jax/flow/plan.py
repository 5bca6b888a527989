"""The sampling plan: every time, stage and guidance decision, made in NumPy before sampling."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ppflow_jax.errors import InputError
from ppflow_jax.flow.grids import aligned_grid, jump_grid, reference_grid
from ppflow_jax.flow.known import KEEPS
from ppflow_jax.flow.method import Method
from ppflow_jax.flow.multistep import MULTISTEP, Rows
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.solvers import DIFFUSIONS, JUMPS, LAST_STEPS, ODE_SOLVERS, SDE_SOLVERS
from ppflow_jax.flow.times import shifted, unshifted
from ppflow_jax.pyramid import Pyramid

GRIDS = ("aligned", "reference")
ADAPTIVE = "dopri5"
FITTED = "fitted"  # rows of a plan file
SOLVERS = (*ODE_SOLVERS, *MULTISTEP, ADAPTIVE, *SDE_SOLVERS, *JUMPS)


@dataclass(frozen=True)
class SamplerConfig:
    """How to integrate from noise to data.

    Attributes:
      solver: one of `SOLVERS`; `sde-euler` and `sde-heun` are stochastic, `dopri5` adaptive,
        `meanflow` jumps over the intervals of the grid (models of average velocities only).
      steps: intervals on the aligned grid; points of `linspace(0, 1, steps)` on the reference
        grid, which makes steps - 1 intervals. The adaptive solver chooses its own steps.
      grid: `aligned` makes every stage boundary a grid point, and a step belongs wholly to one
        stage; `reference` is the grid of the PyTorch code, where the stage follows the time of
        every evaluation.
      cfg: guidance scale of every stage, or one for all. 1 does not evaluate the null class.
      cfg_channels: 0 guides all channels; n > 0 only the first n (the PyTorch code guides 3).
      cfg_until: times up to which each of `cfg` holds, increasing, the last one 1: the scales
        then follow these pieces of time instead of the stages.
      cfg_interval: guide only in these times (guidance interval, arXiv 2404.07724).
      rtol, atol: of the adaptive solver.
      diffusion, diffusion_norm: SDE diffusion form and its factor (SiT, Sec. 2.4).
      last_step, last_step_size: how the SDE covers the last piece of time, up to t = 1.
      keep: put what is known of an image in its place (see `flow.known`): at the `end`, or also
        before all `steps`.

    Raises:
      InputError: a value out of its range.
    """

    solver: str = "heun"
    steps: int = 50
    grid: str = "aligned"
    cfg: tuple[float, ...] = (1.0,)
    cfg_channels: int = 0
    cfg_until: tuple[float, ...] = ()
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    rtol: float = 1e-3
    atol: float = 1e-6
    diffusion: str = "sigma"
    diffusion_norm: float = 1.0
    last_step: str = "mean"
    last_step_size: float = 0.04
    keep: str | None = None

    def __post_init__(self):
        for name, value, known in (
            ("solver", self.solver, (*SOLVERS, FITTED)),
            ("grid", self.grid, GRIDS),
            ("diffusion", self.diffusion, tuple(DIFFUSIONS)),
            ("last_step", self.last_step, LAST_STEPS),
            ("keep", self.keep or "end", KEEPS[:1] if self.solver == ADAPTIVE else KEEPS),
        ):
            if value not in known:
                raise InputError(f"unknown {name} {value!r}: one of {', '.join(known)}")
        if self.steps < 1 or (self.grid == "reference" and self.steps < 2):
            raise InputError(
                f"steps must be at least {2 if self.grid == 'reference' else 1} "
                f"on the {self.grid} grid, got {self.steps}"
            )
        if self.solver in JUMPS and self.grid != "aligned":
            raise InputError(f"solver={self.solver} jumps from stage to stage: leave grid=aligned")
        if not all(np.isfinite(self.cfg)):
            raise InputError(f"guidance scales must be finite numbers, got {self.cfg}")
        pieces = self.cfg_until
        if pieces and (
            len(pieces) != len(self.cfg)
            or pieces[-1] != 1
            or not all(a < b for a, b in zip((0.0, *pieces), pieces))
        ):
            raise InputError(
                f"guidance scales {self.cfg} up to the times {pieces}: give one increasing time "
                "in (0, 1] for each scale, the last one 1"
            )
        if not 0 <= self.cfg_interval[0] <= self.cfg_interval[1] <= 1:
            raise InputError(
                f"guidance interval {self.cfg_interval} must be two times 0 <= low <= high <= 1"
            )
        if self.cfg_channels < 0:
            raise InputError(f"cfg_channels must be at least 0, got {self.cfg_channels}")
        for name in ("rtol", "atol", "diffusion_norm"):
            if not 0 < getattr(self, name) < np.inf:
                raise InputError(f"{name} must be a number above 0, got {getattr(self, name)}")
        if not 0 < self.last_step_size < 1:
            raise InputError(f"last_step_size must be in (0, 1), got {self.last_step_size}")

    @property
    def stochastic(self) -> bool:
        return self.solver in SDE_SOLVERS

    def scales(self, pyramid: Pyramid) -> tuple[float, ...]:
        """Guidance scale of every stage (unless `cfg_until` gives them by time).

        Raises:
          InputError: neither one scale nor one for every stage.
        """
        if self.cfg_until:
            return (1.0,) * len(pyramid)
        if len(self.cfg) not in (1, len(pyramid)):
            raise InputError(
                f"{len(self.cfg)} guidance scales for a model of {len(pyramid)} stage(s): "
                f"give 1 or {len(pyramid)}, e.g. --cfg={','.join(['1.5'] * len(pyramid))}"
            )
        return self.cfg if len(self.cfg) == len(pyramid) else self.cfg * len(pyramid)

    def scale_at(self, t: np.floating, stage_scale: float) -> float:
        """Guidance scale of an evaluation in a step whose guidance is decided at time `t`.

        A boundary belongs to the piece on its left, as with stages: guided are low < t <= high,
        and t = 0 where low = 0. The comparison is in float32, as for stages.
        """
        low, high = (np.float32(v) for v in self.cfg_interval)
        if t > high or (t <= low and low > 0):
            return 1.0
        if not self.cfg_until:
            return stage_scale
        return self.cfg[bisect.bisect_left([np.float32(v) for v in self.cfg_until[:-1]], t)]

    def guidance_cuts(self) -> tuple[float, ...]:
        """Times inside (0, 1) where guidance may change."""
        return tuple(sorted({v for v in (*self.cfg_until, *self.cfg_interval) if 0 < v < 1}))


@dataclass(frozen=True)
class Segment:
    """Consecutive steps that share every static fact.

    Attributes:
      kind: `ode`, `multistep`, `sde`, `last` (the SDE's noise-free last step), `adaptive` or
        `jump` (an evaluation is the average velocity of its step).
      stages: stage of each model evaluation within a step.
      scales: guidance scale of each evaluation.
      times: grid points, one more than steps; float32 values.
      method: how its evaluations are computed; None is the plain network.
      full: of every step, whether it is full in the sense of `Method`.
      inputs: what the method is given, a pytree of arrays with a leading axis of steps.
      keeps: whether the method's memory of the segment before is kept.
      rows: of a multistep solver.
      embedded: whether the network is told the scales, and evaluates no null class.
    """

    kind: str
    stages: tuple[int, ...]
    scales: tuple[float, ...]
    times: tuple[float, ...]
    method: Method | None = None
    full: tuple[bool, ...] = ()
    inputs: Any = field(default=None, compare=False)
    keeps: bool = False
    rows: Rows | None = field(default=None, compare=False)
    embedded: bool = False

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def guided(self) -> tuple[bool, ...]:
        """Whether each evaluation also evaluates the null class."""
        return tuple(s != 1.0 and not self.embedded for s in self.scales)


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


def plan(config: SamplerConfig, pyramid: Pyramid, flow: Flow) -> tuple[Segment, ...]:
    """Segments of a run, in order.

    For the adaptive solver there is one per stage and change of guidance; a stochastic one with a
    last step has that step as its last segment; a multistep one looks at no step of another stage
    or guidance (their velocities are another field's, which costs more than the lower order). On
    the aligned grid stage and guidance of a step follow its middle; on the reference grid stages
    follow the time of each evaluation, and whether a step is guided the time where it starts. The
    stage of a jump is the one in which it starts.

    Raises:
      InputError: guidance scales or steps that do not fit the pyramid.
    """
    scales = config.scales(pyramid)
    lo, hi = time_range(config, flow)
    if config.solver == FITTED:
        raise InputError("solver=fitted is that of a plan file: give the file as the plan")
    if config.solver == ADAPTIVE:
        return _adaptive(config, pyramid, (lo, hi))
    multistep, jumps = config.solver in MULTISTEP, config.solver in JUMPS
    nodes = (0.0,) if multistep else (ODE_SOLVERS | SDE_SOLVERS | JUMPS)[config.solver].nodes
    aligned = config.grid == "aligned"
    times = _grid(config, pyramid, flow, (lo, hi))

    def facts(t0: np.float32, t1: np.float32) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Stage and scale of every evaluation; a step is guided or not as a whole."""
        middle = (t0 + t1) / 2
        if jumps:
            stages = (pyramid.stage_from(t0),)
        elif aligned:
            stages = (pyramid.stage_at(middle),) * len(nodes)
        else:
            stages = tuple(pyramid.stage_at(t0 + np.float32(node) * (t1 - t0)) for node in nodes)
        decided = middle if aligned else t0
        return stages, tuple(config.scale_at(decided, scales[s]) for s in stages)

    steps = [(facts(a, b), float(a), float(b)) for a, b in zip(times, times[1:])]
    kind = "sde" if config.stochastic else "multistep" if multistep else "jump" if jumps else "ode"
    segments: list[Segment] = []
    for (stages, step_scales), group in itertools.groupby(steps, key=lambda s: s[0]):
        group = list(group)
        points = (group[0][1], *(s[2] for s in group))
        segments.append(Segment(kind, stages, step_scales, points))
    if multistep:
        restarts = tuple(np.cumsum([s.steps for s in segments[:-1]]).tolist())
        return with_rows(segments, MULTISTEP[config.solver](flow, times, restarts))
    if config.stochastic and config.last_step != "none":
        start, end = times[-1], times[-1] + np.float32(config.last_step_size)
        stage = pyramid.stage_at(start)
        scale = config.scale_at((start + end) / 2 if aligned else start, scales[stage])
        last = (float(start), float(start) + config.last_step_size)
        segments.append(Segment("last", (stage,), (scale,), last))
    return tuple(segments)


def _grid(
    config: SamplerConfig, pyramid: Pyramid, flow: Flow, between: tuple[float, float]
) -> np.ndarray:
    """float32 times, moved by the flow's shift (see `flow.times`)."""
    if config.solver in JUMPS:
        if flow.shift != 1:
            raise InputError(f"solver={config.solver} has no shifted times: choose an ODE solver")
        return jump_grid(*between, config.steps, pyramid)
    if config.grid == "aligned":
        return aligned_grid(*between, config.steps, pyramid, flow.shift)
    if flow.shift == 1:
        return reference_grid(*between, config.steps)
    raw = reference_grid(*(unshifted(t, flow.shift) for t in between), config.steps)
    return np.float32(shifted(np.float64(raw), flow.shift))


def _adaptive(
    config: SamplerConfig, pyramid: Pyramid, between: tuple[float, float]
) -> tuple[Segment, ...]:
    (lo, hi), scales = between, config.scales(pyramid)
    cuts = sorted({*pyramid.boundaries, *config.guidance_cuts()})
    ends = np.float32([lo, *(b for b in cuts if lo < b < hi), hi])
    pieces = [(pyramid.stage_at((a + b) / 2), a, b) for a, b in zip(ends, ends[1:])]
    return tuple(
        Segment("adaptive", (s,), (config.scale_at((a + b) / 2, scales[s]),), (float(a), float(b)))
        for s, a, b in pieces
    )


def with_rows(segments: Iterable[Segment], rows: Rows) -> tuple[Segment, ...]:
    """Multistep segments with their parts of the rows of the whole plan."""
    out, first = [], 0
    for s in segments:
        out.append(replace(s, rows=rows.part(first, first + s.steps)))
        first += s.steps
    return tuple(out)


def evaluations(segments: tuple[Segment, ...]) -> int:
    """NFE of a fixed-grid plan; a guided evaluation counts once."""
    return sum(s.steps * len(s.stages) for s in segments)
