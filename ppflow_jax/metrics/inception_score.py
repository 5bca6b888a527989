"""Inception Score (Salimans et al. 2016, arXiv:1606.03498)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

SPLIT_SIZE = 5000  # of ADM


def inception_scores(
    logits: Float[np.ndarray, "n c"], *, splits: int | None = None, split_size: int = SPLIT_SIZE
) -> Float[np.ndarray, " parts"]:
    """exp(mean of KL(p(y|x) || p(y))) of every part; the score is their mean.

    Parts are `split_size` consecutive rows, the last one shorter, as in ADM; with `splits` they
    are rows [i n // splits, (i + 1) n // splits), as in the original code. 0 log 0 = 0.
    """
    n = len(logits)
    bounds = range(0, n, split_size)
    if splits:
        bounds = [i * n // splits for i in range(splits)]
    ends = [*bounds[1:], n]
    return np.array([_score(np.asarray(logits[a:b], np.float64)) for a, b in zip(bounds, ends)])


def _score(logits: Float[np.ndarray, "n c"]) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    mean = p.mean(axis=0)
    log_mean = np.log(np.where(mean > 0, mean, 1.0))  # such a class has p = 0 in every row
    return float(np.exp(np.sum(p * (log_p - log_mean), axis=1).mean()))
