"""Which patch size holds at which time: the only source of truth about stages."""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import SupportsFloat

import numpy as np

from ppflow_jax.errors import InputError

_STAGE = re.compile(r"(\d+)x(\d+)@([0-9.eE+-]+)")


@dataclass(frozen=True)
class Stage:
    """One level of the pyramid: `patch` (rows, columns) holds up to and including time `t_end`."""

    t_end: float
    patch: tuple[int, int]


@dataclass(frozen=True)
class Pyramid:
    """Stages from coarse to fine (PPFlow, arXiv 2506.23543, Sec. 3.1).

    Stage `i` covers `(t_end[i-1], t_end[i]]`; a boundary belongs to the stage on its left.
    SiT is the pyramid with one stage.

    Raises:
      InputError: no stage, times not increasing to exactly 1, or a patch smaller than 1.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self):
        ends = [s.t_end for s in self.stages]
        if not ends or ends[-1] != 1.0 or any(a >= b for a, b in zip([0.0, *ends], ends)):
            raise InputError(
                f"stage end times {ends} are not a division of time: "
                "give increasing values in (0, 1], the last one 1"
            )
        if any(min(s.patch) < 1 for s in self.stages):
            raise InputError(f"patch sizes must be at least 1x1, got {self}")

    @classmethod
    def parse(cls, text: str) -> Pyramid:
        """`"4x4@0.5,4x2@0.75,2x2@1"`: patch width x height, each up to a time.

        As in the paper, and as picture sizes are written, the width comes first.

        Raises:
          InputError: `text` is not of that form.
        """
        stages = []
        for part in text.replace(" ", "").split(","):
            match = _STAGE.fullmatch(part)
            try:
                stages.append(Stage(float(match[3]), (int(match[2]), int(match[1]))))
            except (TypeError, ValueError):
                raise InputError(
                    f"pyramid {text!r}: cannot read {part!r}; "
                    "write WIDTHxHEIGHT@T_END, e.g. 4x4@0.5,2x2@1"
                ) from None
        return cls(tuple(stages))

    def __str__(self) -> str:
        return ",".join(f"{s.patch[1]}x{s.patch[0]}@{s.t_end:g}" for s in self.stages)

    def __len__(self) -> int:
        return len(self.stages)

    @property
    def boundaries(self) -> tuple[float, ...]:
        """Inner boundaries, without 0 and 1."""
        return tuple(s.t_end for s in self.stages[:-1])

    @property
    def intervals(self) -> tuple[tuple[float, float], ...]:
        """Time range of every stage."""
        ends = (0.0, *(s.t_end for s in self.stages))
        return tuple(zip(ends, ends[1:]))

    @property
    def durations(self) -> tuple[float, ...]:
        """Length of time of every stage."""
        return tuple(b - a for a, b in self.intervals)

    def stage_at(self, t: SupportsFloat) -> int:
        """Index of the stage at time `t`, compared in float32 as the sampler does.

        Times outside [0, 1] belong to the first or last stage.
        """
        ends = [np.float32(b) for b in self.boundaries]
        return bisect.bisect_left(ends, np.float32(t))

    def stage_from(self, t: SupportsFloat) -> int:
        """Index of the stage in which an interval that starts at `t` begins: a boundary starts the
        stage on its right."""
        ends = [np.float32(b) for b in self.boundaries]
        return bisect.bisect_right(ends, np.float32(t))

    def grid(self, stage: int, latent_size: int) -> tuple[int, int]:
        """Token grid (rows, columns) of a stage on a square latent.

        Raises:
          InputError: the patch does not divide the latent.
        """
        rows, cols = self.stages[stage].patch
        if latent_size % rows or latent_size % cols:
            raise InputError(
                f"latent size {latent_size} is not divisible by the {cols}x{rows} patch of "
                f"stage {stage}: choose patches that divide it"
            )
        return latent_size // rows, latent_size // cols

    def shares(self) -> tuple[int, ...]:
        """Smallest whole numbers in the ratio of the stages' durations, e.g. (2, 1, 1)."""
        ends = [Fraction(s.t_end).limit_denominator(1000) for s in self.stages]
        parts = [b - a for a, b in zip([Fraction(0), *ends], ends)]
        scale = np.lcm.reduce([p.denominator for p in parts])
        return tuple(int(p * int(scale)) for p in parts)


SIT = Pyramid.parse("2x2@1")
PPFLOW2 = Pyramid.parse("4x4@0.5,2x2@1")
PPFLOW3 = Pyramid.parse("4x4@0.5,4x2@0.75,2x2@1")
