"""Mean and covariance of features, seen in parts of any size and order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from ppflow_jax.errors import InputError


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance (divided by n - 1) of features; `count` is 0 where it is not known.

    Raises:
      InputError: values that are not finite.
    """

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]
    count: int = 0

    def __post_init__(self):
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise InputError("the mean or covariance of the features is NaN or infinite")


class Moments:
    """Running sums in float64 around the first feature.

    The shift keeps the digits where the mean is large beside the deviations (Chan, Golub and
    LeVeque 1983, sec. 3): without it sums of squares of features around 1000 lose all of them in
    float32, and four in float64.
    """

    def __init__(self):
        self.count = 0
        self._shift = self._sum = self._products = None

    @classmethod
    def of(cls, count: int, *sums: np.ndarray) -> Moments:
        """What was added, from its `sums`."""
        made = cls()
        made.count, (made._shift, made._sum, made._products) = count, sums
        return made

    @property
    def sums(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shift [d], sum [d] and products [d, d] of what was added, float64."""
        return self._shift, self._sum, self._products

    def add(self, features: Float[np.ndarray, "n d"]) -> None:
        """Takes in some more; float32 is widened before any arithmetic."""
        x = np.asarray(features, np.float64)
        if not len(x):
            return
        if self._shift is None:
            self._shift = x[0].copy()
            self._sum = np.zeros_like(self._shift)
            self._products = np.zeros((len(self._shift),) * 2)
        x = x - self._shift
        self._sum += x.sum(axis=0)
        self._products += x.T @ x
        self.count += len(x)

    def statistics(self) -> Statistics:
        """Of all that was added.

        Raises:
          InputError: fewer than two features, or some not finite.
        """
        if self.count < 2:
            raise InputError(f"{self.count} image(s): a covariance needs at least 2")
        mean = self._sum / self.count
        covariance = (self._products - self.count * np.outer(mean, mean)) / (self.count - 1)
        return Statistics(self._shift + mean, covariance, self.count)
