"""Feed-forward experts of which every token passes a few: three programs for one function.

* `ragged` sorts the pairs of token and expert by expert and multiplies each group by its weights
  (`jax.lax.ragged_dot`). No token is dropped and an expert may have none. GPU and TPU have an
  operation for it; elsewhere every expert would be multiplied by every pair.
* `blocks` fills the groups up to whole blocks of rows, each of one expert, so that plain batched
  products do it (MegaBlocks, arXiv 2211.15841). For CPU.
* `dense` multiplies every token by every expert. It does E / K times the work; for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Weights = Mapping[str, Float[Array, "e _ _"]]
_LARGEST, _SMALLEST = 128, 8  # rows of a block


def mixture(
    program: str,
    weights: Weights,
    x: Float[Array, "t d"],
    gate: Float[Array, "t k"],
    expert: Int[Array, "t k"],
) -> Float[Array, "t d"]:
    """sum_k gate_k E_{expert_k}(x), in float32; no expert twice for a token.

    Args:
      program: `ragged`, `blocks` or `dense`.
      weights: `up` [e, d, f] and `down` [e, f, d]. With `gate` [e, d, f] an expert is
        down(SiLU(gate x) * up x), with `up_bias` [e, f] it is down(GELU(up x + up_bias)).
    """
    return {"ragged": _ragged, "blocks": _blocks, "dense": _dense}[program](
        weights, x, gate, expert
    )


def hidden(weights: Weights, product: Callable[[Array], Array], bias: Array | None) -> Array:
    if "gate" in weights:
        return jax.nn.silu(product(weights["gate"])) * product(weights["up"])
    return jax.nn.gelu(product(weights["up"]) + bias, approximate=True)


def _bias(weights: Weights, rows: Int[Array, " r"]) -> Array | None:
    return weights["up_bias"][rows] if "up_bias" in weights else None


def _dense(weights: Weights, x: Array, gate: Array, expert: Array) -> Array:
    count = weights["up"].shape[0]
    share = jnp.sum(jax.nn.one_hot(expert, count) * gate[..., None], axis=1)
    bias = weights["up_bias"][None] if "up_bias" in weights else None
    h = hidden(weights, lambda w: jnp.einsum("td,edf->tef", x, w), bias)
    y = jnp.einsum("tef,efd->ted", h, weights["down"])
    return jnp.einsum("ted,te->td", y.astype(jnp.float32), share)


def _ragged(weights: Weights, x: Array, gate: Array, expert: Array) -> Array:
    pairs = expert.reshape(-1)
    order = jnp.argsort(pairs)
    sizes = jnp.bincount(pairs, length=weights["up"].shape[0]).astype(jnp.int32)
    rows = picked(jnp.repeat(x, expert.shape[1], axis=0), order)

    def product(rows: Array) -> Callable[[Array], Array]:
        return lambda w: jax.lax.ragged_dot(rows, w, sizes)

    h = hidden(weights, product(rows), _bias(weights, pairs[order]))
    y = picked(product(h)(weights["down"]), jnp.argsort(order))
    return summed(y, gate)


def _blocks(weights: Weights, x: Array, gate: Array, expert: Array) -> Array:
    count, pairs = weights["up"].shape[0], expert.reshape(-1)
    rows = min(_LARGEST, max(_SMALLEST, 1 << (pairs.size // count).bit_length()))
    number = -(-pairs.size // rows) + count - 1
    sizes = jnp.bincount(pairs, length=count)
    ends = jnp.cumsum(-(-sizes // rows))  # in blocks
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(number), side="right"), count - 1)
    order = jnp.argsort(pairs)
    rank = jnp.zeros_like(pairs).at[order].set(jnp.arange(pairs.size), unique_indices=True)
    first = rows * (ends - -(-sizes // rows)) - (jnp.cumsum(sizes) - sizes)
    place = rank + first[pairs]  # row of every pair
    source = pairs.size + jnp.arange(number * rows)  # nothing
    source = source.at[place].set(jnp.arange(pairs.size), unique_indices=True)
    filled = picked(jnp.repeat(x, expert.shape[1], axis=0), source)
    filled = filled.reshape(number, rows, x.shape[-1])

    def product(filled: Array) -> Callable[[Array], Array]:
        return lambda w: jnp.einsum("nrd,ndf->nrf", filled, w[owner])

    bias = _bias(weights, owner)
    h = hidden(weights, product(filled), None if bias is None else bias[:, None])
    y = product(h)(weights["down"])
    return summed(picked(y.reshape(number * rows, -1), place), gate)


def picked(x: Float[Array, "r d"], rows: Int[Array, " p"]) -> Float[Array, "p d"]:
    """Rows of x, none twice; zeros for a number that x does not have.

    So the gradient is a permutation as well, the same bits in any order of summation.
    """
    return x.at[rows].get(mode="fill", fill_value=0, unique_indices=True)


def summed(y: Float[Array, "p d"], gate: Float[Array, "t k"]) -> Float[Array, "t d"]:
    y = y.astype(jnp.float32).reshape(*gate.shape, -1)
    return jnp.sum(y * gate[..., None], axis=1)
