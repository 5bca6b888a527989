"""Kernel inception distance (Binkowski et al. 2018, arXiv:1801.01401)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

SUBSETS, SUBSET_SIZE = 100, 1000  # of the usual report


def kid(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3; it may be negative.

    Float64 throughout: the three means nearly cancel.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    within = 0.0
    for z in (x, y):
        kernel = _kernel(z, z)
        within += (kernel.sum() - np.trace(kernel)) / (len(z) * (len(z) - 1))
    return float(within - 2 * _kernel(x, y).mean())


def _kernel(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    inner = x @ y.T / x.shape[1] + 1
    return inner * inner * inner  # a power of an array takes ten times longer


def subset_indices(
    n: int, m: int, *, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0
) -> tuple[Int[np.ndarray, "subsets size"], Int[np.ndarray, "subsets size"]]:
    """Rows of every subset, without repetition inside one; `size` is at most n and m.

    Equal to torchmetrics after `torch.manual_seed(seed)`: both use the Mersenne Twister, and
    PyTorch's `randperm` exchanges entry i with entry i + (32 random bits) mod (n - i).
    """
    return draw_subsets(np.random.RandomState(seed), n, m, subsets=subsets, size=size)


def draw_subsets(
    random: np.random.RandomState, n: int, m: int, *, subsets: int, size: int
) -> tuple[Int[np.ndarray, "subsets size"], Int[np.ndarray, "subsets size"]]:
    """`subset_indices` from a generator that has been used before."""
    drawn = [
        [_first_of_permutation(random, count, size) for count in (n, m)] for _ in range(subsets)
    ]
    rows = np.array(drawn, np.int64).reshape(subsets, 2, -1)
    return rows[:, 0], rows[:, 1]


def _first_of_permutation(random: np.random.RandomState, n: int, size: int) -> list[int]:
    bits = random.randint(0, 2**32, size=n - 1, dtype=np.uint32).tolist()
    order = list(range(n))
    for i in range(min(size, n - 1)):
        j = i + bits[i] % (n - i)
        order[i], order[j] = order[j], order[i]
    return order[:size]


def kid_of_subsets(
    x: Float[np.ndarray, "n d"],
    y: Float[np.ndarray, "m d"],
    rows_x: Int[np.ndarray, "subsets size"],
    rows_y: Int[np.ndarray, "subsets size"],
) -> tuple[float, float]:
    """Mean and standard deviation (of the population) over the subsets."""
    values = [kid(x[i], y[j]) for i, j in zip(rows_x, rows_y, strict=True)]
    return float(np.mean(values)), float(np.std(values))
