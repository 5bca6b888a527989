"""Which times are drawn and stepped through: the shift by dimension, and logit-normal times.

A latent of many numbers is still recognised under noise that hides one of few. RAE (arXiv
2510.11690, after SD3, arXiv 2403.03206) therefore moves times towards noise: with raw time s,

    t = s / (1 + (a - 1) (1 - s)),   a = sqrt(m / 4096),

for m numbers of a latent; both run from 0 (noise) to 1 (data), a = 1 changes nothing. In time that
runs the other way, n = 1 - s, it is a n / (1 + (a - 1) n).

Raw time exists only here: training draws it and a sampler's grid is even in it. **Every other time,
as stages' ends, guidance intervals and `stage_times`, is t**, the path's, which the network is
told. `unshifted` and `shifted` go between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError
from ppflow_jax.models.leaves import Described

BASE_NUMBERS = 4096  # of a latent that is not shifted: 32x32x4
_MOST_SHARES = 8


def shift_of(numbers: int) -> float:
    """a for latents of so many numbers.

    Raises:
      InputError: fewer than 4096, for which there is no rule.
    """
    if numbers < BASE_NUMBERS:
        raise InputError(
            f"config.flow.shift=0 is for latents of {BASE_NUMBERS} numbers or more, these have "
            f"{numbers}: give a shift, 1 for none"
        )
    return math.sqrt(numbers / BASE_NUMBERS)


def shifted(s: Any, shift: float) -> Any:
    """Raw time -> t; numbers or arrays."""
    return s / (1 + (shift - 1) * (1 - s))


def unshifted(t: Any, shift: float) -> Any:
    """t -> raw time."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class LogitNormal(Described):
    """Raw times whose log(s / (1 - s)) is normal.

    Attributes:
      mean, std: above 0, more times near data.

    Raises:
      InputError: a deviation that is not above 0.
    """

    kind = "logit_normal"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        if not 0 < self.std < math.inf or not math.isfinite(self.mean):
            raise InputError(f"{self}: std must be a number above 0, mean a number")


@dataclass(frozen=True)
class Law:
    """How times are distributed in training: uniform or logit-normal raw times, then shifted."""

    shift: float = 1.0
    normal: LogitNormal | None = None

    @property
    def plain(self) -> bool:
        """Uniform."""
        return self.shift == 1 and self.normal is None

    def cleaner(self, t: float) -> float:
        """The probability of a time nearer to data than t."""
        noise = min(max(1 - unshifted(t, self.shift), 0.0), 1.0)
        if self.normal is None or noise in (0, 1):
            return noise
        normal = NormalDist(-self.normal.mean, self.normal.std)
        return normal.cdf(math.log(noise / (1 - noise)))

    def _cleaner(self, ends: Float[np.ndarray, " b"]) -> Float[Array, " b"]:
        few, where = np.unique(ends, return_inverse=True)
        return jnp.asarray(np.float32([self.cleaner(float(t)) for t in few])[where])

    def masses(self, intervals: Sequence[tuple[float, float]]) -> tuple[float, ...]:
        """The probability of every interval of t."""
        return tuple(self.cleaner(a) - self.cleaner(b) for a, b in intervals)

    def times(
        self, u: Float[Array, " b"], low: Float[np.ndarray, " b"], high: Float[np.ndarray, " b"]
    ) -> Float[Array, " b"]:
        """Times in [low, high] from numbers uniform in [0, 1)."""
        near, far = (self._cleaner(ends) for ends in (high, low))
        p = near + u * (far - near)
        if self.normal is not None:
            z = jax.scipy.special.ndtri(p)
            p = jax.nn.sigmoid(self.normal.std * z - self.normal.mean)
        return jnp.clip(shifted(1 - p, self.shift), jnp.float32(low), jnp.float32(high))


def shares(masses: Sequence[float]) -> tuple[int, ...]:
    """Small whole numbers in about this ratio, of up to 8 samples together, none below 1.

    A stage counts in the loss by its mass, whatever its share.
    """
    counts = [max(1, round(_MOST_SHARES * mass)) for mass in masses]
    while sum(counts) > max(_MOST_SHARES, len(counts)):
        counts[counts.index(max(counts))] -= 1
    divisor = math.gcd(*counts)
    return tuple(count // divisor for count in counts)
