"""Which blocks in a row a few linear maps could stand for (PPCL, arXiv 2511.16156, Sec. 3.1).

The probe of block i is the linear map of its residual, h W + b + h ~ B_i(h), by least squares. From
what enters block u + 1 the probes of blocks u + 1 ... k make what a linear model would make of it,
and CKA, centred kernel alignment (arXiv 1905.00414), says how much that is like what the blocks
make:

    cka(X, Y) = |Yc' Xc|^2 / (|Xc' Xc| |Yc' Yc|),

1 where one is a rotation and a multiple of the other. Where it falls slowly with k, the blocks are
redundant.

A chain of probes is one affine map, so that all of this follows from the means and the products
Z_i' Z_j of the tokens Z_i that enter block i: no activation is kept, and one pass over the data is
enough. For L blocks of width D these are (L + 1)^2 D^2 / 2 numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

Spans = tuple[tuple[int, int], ...]  # first and last block of each
RIDGE = 1e-4  # of the mean square of what enters
_SINGULAR = 1e-12  # eigenvalues below this share of the largest are none


@dataclass
class Moments:
    """Sums over tokens, float64, of tokens Z_0 ... Z_L before the first block and after each.

    Attributes:
      count: tokens.
      sums: of each Z.
      products: [i, j] is Z_i' Z_j; for i > j zero.
      shift: what is taken off the tokens before they are summed, so that large means cost no
        digits.
    """

    count: int
    sums: Float[np.ndarray, "points d"]
    products: Float[np.ndarray, "points points d d"]
    shift: Float[np.ndarray, "points d"]

    @classmethod
    def empty(cls, shift: Float[np.ndarray, "points d"]) -> Moments:
        points, width = shift.shape
        products = np.zeros((points, points, width, width))
        return cls(0, np.zeros((points, width)), products, np.float64(shift))

    @classmethod
    def of(cls, tokens: Float[np.ndarray, "points n d"]) -> Moments:
        """Of tokens that are all here."""
        found = cls.empty(tokens.mean(axis=1, dtype=np.float64))
        found.add(tokens.shape[1], *products_of(np.float64(tokens) - found.shift[:, None]))
        return found

    def add(self, count: int, sums: Any, products: Any) -> None:
        """Sums over `count` more tokens, of which the shift was taken off."""
        self.count += count
        self.sums += np.asarray(sums, np.float64)
        self.products += np.asarray(products, np.float64)

    @property
    def depth(self) -> int:
        return len(self.sums) - 1

    @property
    def means(self) -> Float[np.ndarray, "points d"]:
        return self.shift + self.sums / self.count

    def covariance(self, i: int, j: int) -> Float[np.ndarray, "d d"]:
        """Zc_i' Zc_j, a sum over tokens."""
        if i > j:
            return self.covariance(j, i).T
        return self.products[i, j] - np.outer(self.sums[i], self.sums[j]) / self.count


def products_of(tokens: Any, xp: Any = np) -> tuple[Any, Any]:
    """Sums and products [points, points, d, d] of tokens [points, n, d]; `xp` computes them."""
    points, rows = len(tokens), []
    for i in range(points):
        upper = xp.einsum("ta,jtb->jab", tokens[i], tokens[i:])
        rows.append(xp.concatenate([xp.zeros((i, *upper.shape[1:]), upper.dtype), upper]))
    return tokens.sum(axis=1), xp.stack(rows)


def solved(gram: Float[np.ndarray, "d d"], cross: Float[np.ndarray, "d e"]) -> np.ndarray:
    """W of least norm that minimises |X W - Y|, from X' X and X' Y."""
    return np.linalg.pinv(gram, rcond=_SINGULAR, hermitian=True) @ cross


def least_squares(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n e"]
) -> tuple[Float[np.ndarray, "d e"], Float[np.ndarray, " e"]]:
    """W and b of least norm that minimise |x W + b - y|, float64."""
    augmented = np.concatenate([np.float64(x), np.ones((len(x), 1))], axis=1)
    found = np.linalg.lstsq(augmented, np.float64(y), rcond=None)[0]
    return found[:-1], found[-1]


@dataclass(frozen=True)
class Probes:
    """Linear maps of the residuals of all blocks.

    Attributes:
      kernel, bias: h W + b + h is what block i makes of h.
      residual: |h W + b + h - B(h)| over |B(h) - h|, roots of sums over tokens, of every block.
    """

    kernel: Float[np.ndarray, "depth d d"]
    bias: Float[np.ndarray, "depth d"]
    residual: Float[np.ndarray, " depth"]


def probes_of(moments: Moments, ridge: float = RIDGE) -> Probes:
    """The probes, by least squares; `ridge` of the mean square is added to the diagonal."""
    kernels, biases, residuals = [], [], []
    for i in range(moments.depth):
        gram = moments.covariance(i, i)
        cross = moments.covariance(i, i + 1) - gram
        total = np.trace(moments.covariance(i + 1, i + 1)) - 2 * np.trace(cross) - np.trace(gram)
        more = ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
        kernel = np.linalg.solve(gram + more, cross) if ridge else solved(gram, cross)
        left = total - 2 * np.sum(kernel * cross) + np.sum(kernel * (gram @ kernel))
        before, after = moments.means[i], moments.means[i + 1]
        total += moments.count * np.sum(np.square(after - before))
        kernels.append(kernel)
        biases.append(after - before - before @ kernel)
        residuals.append(np.sqrt(max(left, 0.0) / total) if total > 0 else 0.0)
    return Probes(np.stack(kernels), np.stack(biases), np.array(residuals))


def cka(cross: np.ndarray, gram_x: np.ndarray, gram_y: np.ndarray) -> float:
    """|Yc' Xc|^2 / (|Xc' Xc| |Yc' Yc|) of these products; 0 where one of X and Y is constant."""
    size = np.linalg.norm(gram_x) * np.linalg.norm(gram_y)
    return float(np.sum(np.square(cross)) / size) if size > 0 else 0.0


def chains(moments: Moments, probes: Probes) -> Float[np.ndarray, "depth depth"]:
    """cka[u, k] of what block k makes with what the probes of u + 1 ... k make after block u.

    1 for k = u, NaN for k < u.
    """
    depth, width = moments.depth, moments.sums.shape[1]
    found = np.full((depth, depth), np.nan)
    for u in range(depth):
        map_, gram = np.eye(width), moments.covariance(u + 1, u + 1)
        for k in range(u, depth):
            if k > u:
                map_ = map_ + map_ @ probes.kernel[k]
            cross = map_.T @ moments.covariance(u + 1, k + 1)
            found[u, k] = cka(cross, map_.T @ gram @ map_, moments.covariance(k + 1, k + 1))
    return found


def losses(similarity: Float[np.ndarray, "depth depth"]) -> Float[np.ndarray, "depth depth"]:
    """delta[u, k] = cka[u, k - 1] - cka[u, k], what block k costs a chain; NaN for k <= u."""
    found = np.full_like(similarity, np.nan)
    found[:, 1:] = similarity[:, :-1] - similarity[:, 1:]
    return found


def intervals(
    delta: Float[np.ndarray, "depth depth"], shortest: int = 2, longest: int = 0
) -> Spans:
    """Blocks u ... v that one block may stand for: as long as a block costs less than the last.

    From u on, v is the block before the first at which delta turns from falling to rising, the last
    one where it never does; the next interval begins at v + 1. The paper does not say how it is
    computed: this is one reading of it.

    Args:
      shortest, longest: blocks of an interval; longest 0: any number.
    """
    depth, u, found = len(delta), 0, []
    while u < depth:
        d, v = delta[u], depth - 1
        for k in range(u + 3, depth):
            if d[k] > d[k - 1] and d[k - 1] <= d[k - 2]:
                v = k - 1
                break
        v = min(v, u + (longest or depth) - 1)
        if v - u + 1 >= shortest:
            found.append((u, v))
        u = v + 1
    return tuple(found)


def least_loss(
    cost: Float[np.ndarray, "depth depth"], count: int, shortest: int = 2, longest: int = 0
) -> Spans | None:
    """The intervals without a common block that remove `count` blocks and cost least together.

    None where there are none. `shortest` and `longest` as in `intervals`.

    Args:
      cost: [u, v] of an interval, such as 1 - cka.
    """
    depth = len(cost)
    # by blocks that are passed and removed: (cost, intervals)
    best: dict[tuple[int, int], tuple[float, Spans]] = {(0, 0): (0.0, ())}
    for end in range(1, depth + 1):
        for gone in range(count + 1):
            ways = [best[key]] if (key := (end - 1, gone)) in best else []
            for length in range(shortest, min(longest or depth, end, gone + 1) + 1):
                if (before := best.get((end - length, gone - length + 1))) is not None:
                    span = (end - length, end - 1)
                    ways.append((before[0] + float(cost[span]), (*before[1], span)))
            if ways:
                best[end, gone] = min(ways)
    found = best.get((depth, count))
    return found and found[1]


def removable(similarity: Float[np.ndarray, "depth depth"], floor: float) -> int:
    """Most blocks that intervals without a common block remove, each of cka >= `floor`."""
    most = [0]
    for end in range(1, len(similarity) + 1):
        starts = [u for u in range(end - 1) if similarity[u, end - 1] >= floor]
        most.append(max([most[-1], *(most[u] + end - 1 - u for u in starts)]))
    return most[-1]


def removed(spans: Spans) -> int:
    """Blocks fewer, with one student for each interval."""
    return sum(last - first for first, last in spans)
