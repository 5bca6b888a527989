"""Heads of feature probes: what a linear function of given features tells of the classes.

Ridge regression on one-hot targets has a closed form, so it is the same everywhere. The linear
classifier is that of DDAE (arXiv 2303.09769): cross entropy, Adam, a rate that falls as a cosine
from epoch to epoch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

RIDGE = 1e-2  # penalty, in units of the variance of a standardised feature
EPOCHS, BATCH, LEARNING_RATE = 30, 128, 1e-3  # of DDAE


@dataclass(frozen=True)
class Head:
    """weight [d, classes] and bias [classes] of the largest x @ weight + bias."""

    weight: Float[np.ndarray, "d k"]
    bias: Float[np.ndarray, " k"]

    def logits(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n k"]:
        return np.asarray(features, self.weight.dtype) @ self.weight + self.bias

    def accuracy(self, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"]) -> float:
        return float(np.mean(self.logits(features).argmax(axis=-1) == labels))


def ridge(features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], classes: int) -> Head:
    """Least squares to one-hot targets with an L2 penalty, in float64.

    Features are standardised (those that are constant only centred) and the bias is not penalised:
    W = (Z'Z / n + RIDGE I)^-1 Z'(Y - mean Y) / n.
    """
    x = np.asarray(features, np.float64)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    scale = np.where(deviation > 0, deviation, 1.0)
    z, y = (x - mean) / scale, np.eye(classes)[labels]
    gram = z.T @ z / len(z) + RIDGE * np.eye(z.shape[1])
    weight = np.linalg.solve(gram, z.T @ (y - y.mean(axis=0)) / len(z)) / scale[:, None]
    return Head(weight, y.mean(axis=0) - mean @ weight)


def linear(
    features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], classes: int, seed: int = 0
) -> Head:
    """The classifier of DDAE on a new order of the examples in every epoch.

    It starts as PyTorch draws a linear layer. Of every epoch whole batches are used.
    """
    rng, (count, width) = np.random.default_rng(seed), features.shape
    bound = width**-0.5
    weight = rng.uniform(-bound, bound, (width, classes)).astype(np.float32)
    bias = rng.uniform(-bound, bound, classes).astype(np.float32)
    batch = min(BATCH, count)
    steps = count // batch
    order = np.stack([rng.permutation(count)[: steps * batch] for _ in range(EPOCHS)])
    order = order.reshape(EPOCHS, steps, batch)
    heads, _ = trained((weight, bias), features, labels, order, LEARNING_RATE)
    return Head(*(np.asarray(leaf[-1]) for leaf in heads))


def epoch_rates(lr: float, epochs: int) -> Float[np.ndarray, " e"]:
    """lr (1 + cos(pi e / epochs)) / 2 in epoch e."""
    return lr * 0.5 * (1 + np.cos(np.pi * np.arange(epochs) / epochs))


@functools.partial(jax.jit, static_argnums=4)
def trained(
    start: tuple[Float[Array, "d k"], Float[Array, " k"]],
    features: Float[Array, "n d"],
    labels: Int[Array, " n"],
    order: Int[Array, "e s b"],
    lr: float,
) -> tuple[tuple[Float[Array, "e d k"], Float[Array, "e k"]], Float[Array, "e s"]]:
    """Weight and bias after every epoch, and the loss of every step.

    Args:
      start: weight and bias.
      order: examples of every batch.
      lr: of the first epoch, see `epoch_rates`.
    """
    x = jnp.asarray(features, jnp.float32)
    adam = optax.scale_by_adam(0.9, 0.999, 1e-8)

    def loss(head, rows):
        logits = x[rows] @ head[0] + head[1][None]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]))

    def step(carry, rows, rate):
        head, state = carry
        value, gradient = jax.value_and_grad(loss)(head, rows)
        updates, state = adam.update(gradient, state)
        return (jax.tree.map(lambda p, u: p - rate * u, head, updates), state), value

    def epoch(carry, given):
        rows, rate = given
        carry, losses = jax.lax.scan(lambda c, r: step(c, r, rate), carry, rows)
        return carry, (carry[0], losses)

    rates = jnp.asarray(epoch_rates(lr, len(order)), jnp.float32)
    with jax.default_matmul_precision("highest"):
        _, (heads, losses) = jax.lax.scan(epoch, (start, adam.init(start)), (order, rates))
    return heads, losses


HEADS: dict[str, Callable[..., Head]] = {"ridge": ridge, "linear": linear}
