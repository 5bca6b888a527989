"""Inpainting by replacement and noise at given times, against NumPy restatements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.flow.path import PATHS, Flow, interpolate
from ppflow_jax.flow.plan import SamplerConfig, Segment
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.conditions import Channels
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.pyramid import SIT
from tests.acceptance.comparison import Row

if TYPE_CHECKING:
    from tests.systems_parity import Reference

# The restatements are float64: bounds are float32 rounding over so many steps
EPS = 1.2e-7


def rows(ref: Reference) -> Iterator[Row]:
    if "schedule/image" in ref:
        yield from noised(ref)
    if "inpaint/final" in ref:
        yield from inpainted(ref)


def nhwc(x: np.ndarray) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(x, jnp.float32), -3, -1)


def noised(ref: Reference) -> Iterator[Row]:
    """Images between noise and data at the times where a linear path has DDPM's ratios."""
    image, noise = (nhwc(ref[f"schedule/{name}"]) for name in ("image", "noise"))
    times = ref["schedule/sit_time_of_step"][ref["schedule/start"]]
    found = [
        interpolate(PATHS["linear"], noise, image, jnp.full(len(image), t, jnp.float32))[0]
        for t in times
    ]
    yield from row(ref, "schedule/noised_linear_path", np.moveaxis(found, -1, -3))


def inpainted(ref: Reference) -> Iterator[Row]:
    """Euler steps of a given velocity with the known part replaced before each of them."""
    start = nhwc(ref["inpaint/x_after_step"][0])
    image, mask = nhwc(ref["schedule/image"]), nhwc(ref["inpaint/mask_known"])
    mask = jnp.broadcast_to(mask, (*image.shape[:-1], 1))
    weights, times = jnp.float32(ref["inpaint/W"]), ref["inpaint/t"]
    size, channels = image.shape[1], image.shape[-1]
    model = ModelConfig(
        *(SIT, size, channels, 4, 1, 1, 1), conditions=(Channels("known", 1 + channels),)
    )

    def apply(params, x, t, y, stage):
        return jnp.tanh(x @ weights.T) - (1 - t[:, None, None, None]) * x

    config = SamplerConfig("euler", len(times) - 1, keep="steps")
    segment = Segment("ode", (0,), (1.0,), tuple(map(float, times)))
    sampler = Sampler(apply, model, Flow(), config, segments=(segment,))
    told = {
        "label": jnp.zeros(len(image), jnp.int32),
        "known": jnp.concatenate([mask, image * mask], axis=-1),
    }
    states = np.moveaxis(np.asarray(sampler({}, start, told, trajectory=True)), -1, -3)
    steps = ref["inpaint/x_after_step"]
    error = np.abs(states[:-1] - steps[:-1]).max()
    largest = max(1.0, np.abs(steps).max())
    yield Row("conditions inpaint/x_after_step", float(error), 20 * EPS * len(times) * largest)
    yield from row(ref, "inpaint/final", states[-1], len(times))


def row(ref: Reference, name: str, ours: np.ndarray, steps: int = 1) -> Iterator[Row]:
    theirs = ref[name]
    assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
    largest = max(1.0, np.abs(theirs).max())
    error = np.abs(np.float64(ours) - np.float64(theirs)).max()
    yield Row(f"conditions {name}", float(error), 20 * EPS * steps * largest)
