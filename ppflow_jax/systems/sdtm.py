"""Token merging: on most steps the blocks compute fewer tokens, and every token keeps its place.

SDTM (arXiv 2505.11707), as its released code does it: windows of similar tokens are merged for
attention and MLP while the structure forms, similar tokens anywhere for the MLP alone while the
details do. What merged tokens get back is mixed with what they got at the last full step.
`tome` is the plain alternative to compare with.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ppflow_jax.errors import InputError
from ppflow_jax.flow.plan import Segment
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.systems import token_groups, tome
from ppflow_jax.systems.merged_blocks import Merged, Merging

KINDS = ("sdtm", "tome")


@dataclass(frozen=True)
class MergeConfig:
    """Which tokens are merged, when, and how many.

    The prompt reweighting of SDTM weighs text tokens. It does not apply here: a class condition
    has none, it enters through adaLN alone.

    Attributes:
      merge: one of `KINDS`. `tome` merges for attention alone, with the constant `ratio`, random
        destinations and no stored values; of the fields below it uses `ratio`, `proportional`
        and `merge_stages`.
      ratio: share of the tokens that is merged away, the mean over a stage's steps; 0 is off.
      deviation: the share falls from ratio + deviation to ratio - deviation along a cosine.
      switch: share of a stage's steps after which windows give way to single tokens.
      protect: every so many steps one is full, the first of a stage among them; 0 is never, and
        then nothing is stored.
      frequency: weight of the counters in the choice of windows. Positive as in the released
        code: what was merged is merged again; negative: what was merged is spared.
      mixing: weight of the new value of a merged token, against the stored one.
      round_to: windows and tokens are merged in multiples of this.
      plateaus: at most so many different counts a stage, since each is compiled on its own. Beyond
        this a count becomes the one before or after it, where that changes fewest tokens.
      proportional: in attention a merged token counts as often as it has members (ToMe, arXiv
        2210.09461, Sec. 3); SDTM does without.
      merge_stages: the stages with merging, 0 the coarsest; by default the finest alone. The
        schedule runs once in each.

    Raises:
      InputError: a value out of its range.
    """

    merge: str = "sdtm"
    ratio: float = 0.3
    deviation: float = 0.2
    switch: float = 0.4
    protect: int = 3
    frequency: float = 0.05
    mixing: float = 0.1
    round_to: int = 16
    plateaus: int = 3
    proportional: bool = False
    merge_stages: tuple[int, ...] = ()

    def __post_init__(self):
        if self.merge not in KINDS:
            raise InputError(f"unknown merge {self.merge!r}: one of {', '.join(KINDS)}")
        if not (0 <= self.ratio and 0 <= self.deviation and self.ratio + self.deviation < 1):
            raise InputError(
                f"merge ratio {self.ratio} and deviation {self.deviation} must be at least 0 and "
                "less than 1 together"
            )
        for name in ("switch", "mixing"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"merge {name} {getattr(self, name)} must be in [0, 1]")
        if not np.isfinite(self.frequency):
            raise InputError(f"merge frequency must be a finite number, got {self.frequency}")
        if self.protect < 0 or self.round_to < 1 or self.plateaus < 1:
            raise InputError(
                f"merge protect {self.protect} must be at least 0, round_to {self.round_to} and "
                f"plateaus {self.plateaus} at least 1"
            )


def ratios(steps: int, ratio: float, deviation: float) -> Float[np.ndarray, " k"]:
    """Share of the tokens to merge away at every step, float64.

    (ratio - deviation) + 2 deviation cos(p pi / 2), p from 0 to 1. The order of operations is the
    released code's; another one can end on the other side of a whole number of tokens.
    """
    progress = [i / max(steps - 1, 1) for i in range(steps)]
    cosines = np.array([math.cos(p * math.pi / 2) for p in progress])  # NumPy's differ by machine
    return (ratio - deviation) + 2 * deviation * cosines


def schedule(config: MergeConfig, steps: int, grid: tuple[int, int]) -> list[Merging]:
    """How tokens are merged at every step of a stage, were it not full."""
    n, q = grid[0] * grid[1], config.round_to
    if config.merge == "tome":
        count = min(int(n * config.ratio), n - len(token_groups.cells(grid, (2, 2))))
        return [Merging("tome", count, grid, proportional=config.proportional)] * steps
    quarter = len(token_groups.windows(grid))
    settings = (config.frequency, config.mixing, config.proportional)
    out = []
    for i, ratio in enumerate(ratios(steps, config.ratio, config.deviation)):
        removed = int(n * ratio)
        if removed <= 0:
            kind, count = "nothing", 0
        elif i <= config.switch * steps + 1e-9:
            kind, count = "windows", min(removed // (3 * q) * q, quarter)
        else:
            kind, count = "tokens", min(removed, 3 * quarter) // q * q
        out.append(Merging(kind, count, grid, *settings))
    return out


def on_plateaus(ways: list[Merging], most: int) -> list[Merging]:
    """A stage's schedule with at most `most` different counts, see `MergeConfig.plateaus`.

    Only counts of one kind are made equal: there may be more if there are more kinds.
    """
    while len(set(ways)) > most:
        neighbours = list(itertools.pairwise(dict.fromkeys(ways)))
        changed = {
            (old, new): abs(old.tokens()[1] - new.tokens()[1]) * ways.count(old)
            for old, new in (*neighbours, *((b, a) for a, b in neighbours))
            if old.kind == new.kind
        }
        if not changed:
            break
        old, new = min(changed, key=changed.get)
        ways = [new if way == old else way for way in ways]
    return ways


def full_steps(config: MergeConfig, steps: int) -> Bool[np.ndarray, " k"]:
    """Which steps are full."""
    if config.merge == "tome" or config.protect == 0:
        return np.zeros(steps, bool)
    return np.arange(steps) % config.protect == 0


def merged(segments: Iterable[Segment], model: ModelConfig, config: MergeConfig) -> list[Segment]:
    """The plan with merging in the stages of `config`; other stages and plans stay as they are.

    Consecutive steps with the same counts are a segment; the segments of a stage share a program.
    A change between guided and unguided begins with a full step again, because the batch rows
    differ. Steps that straddle two stages stay.

    Raises:
      InputError: a stage that the model does not have, whose tokens 2x2 windows do not tile, or
        that has another method.
    """
    segments, levels = list(segments), len(model.pyramid)
    chosen = config.merge_stages or (levels - 1,)
    if wrong := [s for s in chosen if not 0 <= s < levels]:
        raise InputError(
            f"merge.stages has {wrong[0]}: the model has {levels} stage(s), 0 to {levels - 1}"
        )
    steps = collections.Counter()
    for s in segments:
        steps[s.stages] += s.steps
    done, out = collections.Counter(), []
    for (stages, _), alike in itertools.groupby(segments, key=lambda s: (s.stages, s.guided)):
        group, stage = list(alike), stages[0]
        n, first = sum(s.steps for s in group), done[stages]
        done[stages] += n
        if len(set(stages)) > 1 or stage not in chosen or config.ratio == 0:
            out.extend(group)
            continue
        if group[0].method is not None:
            intervals = "/".join("1" if s == stage else "4" for s in range(levels))
            without = f"leave one out there, e.g. forecast.interval={intervals}"
            raise InputError(
                f"stage {stage} cannot have both {group[0].method.name} and merged steps: "
                + ("choose one" if levels == 1 else without)
            )
        grid = model.pyramid.grid(stage, model.latent_size)
        methods = on_plateaus(schedule(config, steps[stages], grid), config.plateaus)
        methods = methods[first : first + n]
        full = full_steps(config, n)
        if all(f or m.kind == "nothing" for f, m in zip(full, methods)):
            out.extend(group)
            continue
        methods = _joined(methods, full)
        method = Merged(tuple(dict.fromkeys(methods)), bool(full.any()))
        inputs = {"way": np.int32([method.ways.index(m) for m in methods])}
        if config.merge == "tome":
            inputs["position"] = tome.draws(n, grid)
        out.extend(_pieces(group, method, full, inputs))
    return out


def _joined(methods: list[Merging], full: Bool[np.ndarray, " k"]) -> list[Merging]:
    """Full steps go with the cheap step that follows, the last ones with the one before."""
    cheap = np.flatnonzero(~full)
    following = np.searchsorted(cheap, np.arange(len(full)))
    return [methods[cheap[min(i, len(cheap) - 1)]] for i in following]


def _pieces(
    group: list[Segment], method: Merged, full: Bool[np.ndarray, " k"], inputs: dict[str, Any]
) -> Iterable[Segment]:
    """Segments with this method, cut where the scale or the way to merge changes."""
    owner = [(s, i) for s in group for i in range(s.steps)]
    first = 0
    for _, run in itertools.groupby(
        range(len(owner)), key=lambda k: (id(owner[k][0]), inputs["way"][k])
    ):
        count = len(list(run))
        segment, start = owner[first]
        now = slice(first, first + count)
        yield replace(
            segment,
            times=segment.times[start : start + count + 1],
            rows=segment.rows and segment.rows.part(start, start + count),
            method=method,
            full=tuple(full[now].tolist()),
            inputs={name: table[now] for name, table in inputs.items()},
            keeps=first > 0,
        )
        first += count
