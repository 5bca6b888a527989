"""Training of the small feature network on labelled pictures."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp

from ppflow_jax.console import progress
from ppflow_jax.data.images import source_pictures
from ppflow_jax.data.pipeline import Source
from ppflow_jax.errors import InputError
from ppflow_jax.metrics.small_network import FeatureNet, FeatureNetConfig, Params

BATCH = 128
STEPS = 400
LEARNING_RATE = 3e-3
HELD_OUT = 5  # one example in so many is only for the accuracy
MAX_HELD_OUT = 10_000


def _batches(source: Source, index: np.ndarray, seed: int) -> Iterator[tuple]:
    """Endless (uint8 pictures, labels), in a new order every epoch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(index)
        for first in range(0, len(order) - BATCH + 1, BATCH):
            yield source_pictures(source, order[first : first + BATCH])


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _step(network: FeatureNet, tx: optax.GradientTransformation, params, state, images, labels):
    def loss(params):
        logits = network.features(params, images, ("logits",))["logits"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value


@functools.partial(jax.jit, static_argnums=0)
def _classes(network: FeatureNet, params, images):
    return network.features(params, images, ("logits",))["logits"].argmax(axis=-1)


def train_features(
    source: Source, classes: int, *, seed: int = 0, steps: int = STEPS
) -> tuple[FeatureNetConfig, Params, dict[str, Any]]:
    """Config, parameters, and what is to be said of them, among it the accuracy on held-out data.

    Labels are from 0 to `classes` - 1; pictures in [-1, 1] are rounded to 0..255 as samples are.
    Equal for equal seeds on one machine and library version.

    Raises:
      InputError: no pictures of 1 or 3 channels, or too few.
    """
    _, size, _, channels = source_pictures(source, np.arange(1))[0].shape
    index = np.arange(len(source))
    held = index % HELD_OUT == HELD_OUT - 1
    train, test = index[~held], index[held][:MAX_HELD_OUT]
    if len(train) < BATCH:
        raise InputError(
            f"{source.name} has {len(source)} examples: a feature network needs at least "
            f"{BATCH * HELD_OUT // (HELD_OUT - 1)}"
        )
    config = FeatureNetConfig(size, channels, classes)
    network = FeatureNet(config)
    params = jax.device_put(network.init(seed))
    tx = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    state = tx.init(params)
    stream = _batches(source, train, seed)
    with progress(steps, 0, "step", "feature network") as bar:
        for _ in range(steps):
            params, state, _ = _step(network, tx, params, state, *next(stream))
            bar.update()
    right = 0
    for first in range(0, len(test), BATCH):
        images, labels = source_pictures(source, test[first : first + BATCH])
        padded = np.pad(images, [(0, BATCH - len(images)), (0, 0), (0, 0), (0, 0)])
        found = np.asarray(_classes(network, params, jnp.asarray(padded)))[: len(labels)]
        right += int((found == labels).sum())
    origin = {
        "trained_on": source.name,
        "examples": len(train),
        "steps": steps,
        "seed": seed,
        "accuracy": right / len(test),
        "held_out": len(test),
    }
    return config, jax.tree.map(np.asarray, params), origin
