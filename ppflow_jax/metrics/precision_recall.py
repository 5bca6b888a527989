"""Improved precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

NEIGHBOURS = 3  # of ADM and most papers
_CHUNK_BYTES = 2**27  # of one block of distances


class PrecisionRecall(NamedTuple):
    """Precision: share of samples within the radius of some reference point. Recall: the reverse.

    `inside_*` are the single decisions.
    """

    precision: float
    recall: float
    inside_samples: Bool[np.ndarray, " m"]
    inside_reference: Bool[np.ndarray, " n"]


def _blocks(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]
) -> Iterator[tuple[slice, Float[np.ndarray, "_ m"]]]:
    """Squared distances of consecutive rows of x to all of y, in float64."""
    rows = max(1, _CHUNK_BYTES // (8 * len(y)))
    norms = np.einsum("md,md->m", y, y)
    for first in range(0, len(x), rows):
        part = x[first : first + rows]
        own = np.einsum("nd,nd->n", part, part)
        squared = part @ y.T
        squared *= -2
        squared += own[:, None]
        squared += norms
        yield slice(first, first + len(part)), np.maximum(squared, 0, out=squared)


def radii(x: Float[np.ndarray, "n d"], k: int = NEIGHBOURS) -> Float[np.ndarray, " n"]:
    """Squared distance of every point to its k-th nearest neighbour, itself not counted."""
    x = np.asarray(x, np.float64)
    found = np.empty(len(x))
    for rows, squared in _blocks(x, x):
        squared[np.arange(len(squared)), np.arange(rows.start, rows.stop)] = -1  # itself is first
        squared.partition(k, axis=1)
        found[rows] = squared[:, k]
    return found


def precision_recall(
    reference: Float[np.ndarray, "n d"], samples: Float[np.ndarray, "m d"], k: int = NEIGHBOURS
) -> PrecisionRecall:
    """Both, by squared Euclidean distances in float64; needs more than k points in either set.

    ADM as published computes distances in float16 where they fit, which moves the shares by up to
    some thousandths.
    """
    reference, samples = np.asarray(reference, np.float64), np.asarray(samples, np.float64)
    centre = reference.mean(axis=0)  # norms lose fewer digits
    reference, samples = reference - centre, samples - centre
    near_reference, near_samples = radii(reference, k), radii(samples, k)
    inside_samples = np.empty(len(samples), bool)
    inside_reference = np.zeros(len(reference), bool)
    for rows, squared in _blocks(samples, reference):
        inside_samples[rows] = (squared <= near_reference).any(axis=1)
        inside_reference |= (squared <= near_samples[rows, None]).any(axis=0)
    return PrecisionRecall(
        float(inside_samples.mean()),
        float(inside_reference.mean()),
        inside_samples,
        inside_reference,
    )
