"""Frechet distance of two normal distributions (Heusel et al. 2017, arXiv:1706.08500)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ppflow_jax.errors import InputError
from ppflow_jax.metrics.moments import Statistics

# Below this share of the largest one a negative eigenvalue is rounding, of float32 files as well.
_NEGATIVE = 1e-4


class Frechet(NamedTuple):
    """The distance, and the ranks of the two covariances: below the dimension, one is singular."""

    distance: float
    ranks: tuple[int, int]


def _root(covariance: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d r"]:
    """R with R R^T = covariance, one column for every eigenvalue that is not rounding."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    largest = values[-1]
    if values[0] < -_NEGATIVE * max(largest, 0) - np.finfo(np.float64).tiny:
        raise InputError(
            f"this is no covariance: it has eigenvalues from {values[0]:.3g} to {largest:.3g}, "
            "none may be negative"
        )
    kept = values > len(values) * np.finfo(np.float64).eps * largest
    return vectors[:, kept] * np.sqrt(values[kept])


def frechet_distance(a: Statistics, b: Statistics) -> Frechet:
    """|mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)), and the ranks.

    With S = R R^T the last trace is the sum of the singular values of R_a^T R_b. No root is taken
    of eigenvalues that are rounding noise, so singular covariances (fewer features than
    dimensions) keep about 12 digits where a matrix square root keeps 6, or fails.

    Raises:
      InputError: different dimensions, or matrices that are no covariances.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(
            f"statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared: use "
            "the same feature network for both"
        )
    roots = [_root(np.asarray(s.covariance, np.float64)) for s in (a, b)]
    shared = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    difference = np.asarray(a.mean, np.float64) - b.mean
    traces = np.trace(a.covariance, dtype=np.float64) + np.trace(b.covariance, dtype=np.float64)
    distance = difference @ difference + traces - 2 * shared
    return Frechet(float(distance), (roots[0].shape[1], roots[1].shape[1]))
