"""Where arrays live on a device mesh while a network runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array

# Attention: (q, k, v) [b, n, h, e] -> [b, n, h, e]
Attend = Callable[[Array, Array, Array], Array]
# (kernel, otherwise) -> the kernel on each device's part of the arrays, or `otherwise`
PerDevice = Callable[[Attend, Attend], Attend]
# (f, arrays of the batch, weights, prefix of their paths) -> f(arrays, weights)
PerRows = Callable[[Callable[[Any, Any], Array], Any, Any, str], Array]
# The same with an `exchange.Way`: f(arrays, weights, way)
Exchanged = Callable[[Callable[..., Any], Any, Any, str], Any]


def _as_it_is(tree: Any, prefix: str = "") -> Any:
    return tree


def _in_one_piece(kernel: Attend, otherwise: Attend) -> Attend:
    """The compiler cannot cut a kernel: without a mesh it needs a device of its own."""
    alone = jax.local_device_count() == 1 or jax.sharding.get_abstract_mesh().manual_axes
    return kernel if alone else otherwise


def _at_once(f: Callable[[Any, Any], Array], rows: Any, weights: Any, prefix: str) -> Array:
    return f(rows, weights)


def is_gather(operation: Any, *_: Any, **params: Any) -> bool:
    """Whether an operation of a program is the gathering of weights (`sharding.layout`).

    It is the one custom derivative whose body is a sharding constraint and nothing else; any other
    custom derivative, such as a straight-through estimator, is not taken for it. The arguments are
    those of a policy of `jax.checkpoint`.
    """
    if operation.name != "custom_vjp_call":
        return False
    body = [equation.primitive.name for equation in params["call_jaxpr"].eqns]
    return body == ["sharding_constraint"]


@dataclass(frozen=True)
class Layout:
    """Where arrays live on a device mesh while the network runs (see `sharding.layout`).

    Attributes:
      batch: keeps activations split over their first axis.
      weights: (tree, prefix of its paths) -> the weights as they are needed for computing. Blocks
        pass through it one at a time, so that no device ever holds all of them.
      heads: runs a kernel of attention on each device's part of batch and heads; something else
        where that cannot be cut so.
      experts: computes each device's rows of the batch on that device, with its part of the
        weights along `tensor`, over which the results are then summed.
      exchanged: the same where devices have different experts, and f gives them its rows; None:
        every device is given all experts.
    """

    batch: Callable[[Array], Array] = _as_it_is
    weights: Callable[[Any, str], Any] = _as_it_is
    heads: PerDevice = _in_one_piece
    experts: PerRows = _at_once
    exchanged: Exchanged | None = None
