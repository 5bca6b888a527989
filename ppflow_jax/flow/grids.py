"""Times at which a sampler evaluates a network."""

from __future__ import annotations

import numpy as np

from ppflow_jax.errors import InputError
from ppflow_jax.flow.times import shifted, unshifted
from ppflow_jax.pyramid import Pyramid


def aligned_grid(
    lo: float, hi: float, steps: int, pyramid: Pyramid, shift: float = 1.0
) -> np.ndarray:
    """float32 grid on [lo, hi] with `steps` intervals and every boundary inside as a point.

    Intervals are shared among the stages by duration (largest remainder, at least one each)
    and are equal within a stage, both in the raw time of `flow.times`; all times here are t.

    Raises:
      InputError: fewer steps than stages.
    """
    ends = [lo, *(b for b in pyramid.boundaries if lo < b < hi), hi]
    raw = [unshifted(t, shift) for t in ends]
    durations = np.diff(raw)
    if steps < len(durations):
        raise InputError(
            f"{steps} step(s) for {len(durations)} stages on the aligned grid: "
            f"give at least {len(durations)}"
        )
    ideal = durations / (raw[-1] - raw[0]) * steps
    counts = np.maximum(np.floor(ideal + 1e-9).astype(int), 1)
    while counts.sum() < steps:
        counts[np.argmax(ideal - counts)] += 1
    while counts.sum() > steps:
        counts[np.argmax(np.where(counts > 1, counts - ideal, -np.inf))] -= 1
    inner = [np.linspace(a, b, n + 1)[1:-1] for a, b, n in zip(raw, raw[1:], counts)]
    pieces = [[a, *shifted(points, shift)] for a, points in zip(ends, inner)]
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


def jump_grid(lo: float, hi: float, steps: int, pyramid: Pyramid) -> np.ndarray:
    """float32 grid on [lo, hi] of `steps` jumps, which may be fewer than the stages.

    As many as stages or more are those of `aligned_grid`. Of fewer, the last ones start where the
    last stages do: one jump starts in the first stage, the last of several in the last one.
    """
    if steps >= len(pyramid):
        return aligned_grid(lo, hi, steps, pyramid)
    kept = pyramid.boundaries[len(pyramid) - steps :]
    return np.float32([lo, *kept, hi])
