"""A batch in which every stage has its samples, and means over time made from it."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError
from ppflow_jax.flow.terms import Metrics, Weights
from ppflow_jax.models.network import Output
from ppflow_jax.pyramid import Pyramid


def check_batch(pattern: tuple[int, ...], batch_size: int, shards: int, rows: str) -> None:
    """Every one of `shards` equal parts of a batch must hold whole patterns.

    Args:
      rows: what the pattern comes from, for the message.

    Raises:
      InputError: it does not.
    """
    unit = len(pattern) * shards
    if batch_size < 1 or batch_size % unit:
        below = max(unit, batch_size // unit * unit)
        raise InputError(
            f"batch of {batch_size} cannot be divided among {shards} data shard(s) with {rows}: "
            f"choose a multiple of {unit}, e.g. {below}"
        )


def over_time(
    pyramid: Pyramid,
    losses: Sequence[Float[Array, " _"]],
    outputs: Sequence[Output],
    weights: Weights,
    durations: Sequence[float] = (),
) -> tuple[Float[Array, ""], Metrics]:
    """The loss as a mean over time, with what the parts of the blocks add to it, and metrics.

    Args:
      losses: of every sample, by stage.
      outputs: of every stage.
      durations: how much each stage counts; empty: by its length of time.
    """
    durations = durations or pyramid.durations
    means = [jnp.mean(x) for x in losses]
    loss = sum(d * m for d, m in zip(durations, means))
    metrics = {f"loss/stage{i}": m for i, m in enumerate(means)} if len(means) > 1 else {}
    total, terms = with_block_terms(loss, pyramid, outputs, weights, durations)
    return total, metrics | terms | {"loss": loss}


def with_block_terms(
    loss: Float[Array, ""],
    pyramid: Pyramid,
    outputs: Sequence[Output],
    weights: Weights,
    durations: Sequence[float] = (),
) -> tuple[Float[Array, ""], Metrics]:
    """`loss` and the weighted terms of the parts of the blocks, means over time; these by name.

    What has a slash in its name is no term: it is measured, and has no weight.
    """
    found, durations = {}, durations or pyramid.durations
    for name in outputs[0].aux:
        weight = weights.get(name)
        if weight or "/" in name:
            found[name] = sum(d * output.aux[name] for d, output in zip(durations, outputs))
        if weight:
            loss = loss + weight * found[name]
    return loss, found


def strided(x: Array, pattern: tuple[int, ...], stage: int) -> Array:
    """Samples of one stage, in order: a slice of every pattern, so no shard talks to another."""
    where = np.flatnonzero(np.asarray(pattern) == stage)
    first, count = int(where[0]), len(where)
    rows = x.reshape(x.shape[0] // len(pattern), len(pattern), *x.shape[1:])
    return rows[:, first : first + count].reshape(-1, *x.shape[1:])
