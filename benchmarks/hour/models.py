"""The networks that are measured: B and XL with random weights, or small ones of their heads."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.api.model import Model
from ppflow_jax.checkpoints.card import Card
from ppflow_jax.checkpoints.weights import Weights
from ppflow_jax.devices.programs import for_passes
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import FITTED, SamplerConfig
from ppflow_jax.generate.plan import Plan, make_plan
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.network import Apply, Params, abstract_params, make_apply
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT, Pyramid
from ppflow_jax.tune.allocate import start_of
from ppflow_jax.tune.fit import Field

PYRAMIDS = {"SiT": SIT, "2 levels": PPFLOW2, "3 levels": PPFLOW3}
# Heads of 64 and 72, as in B and XL
TINY = {"B": dict(width=64, depth=2, heads=1), "XL": dict(width=144, depth=2, heads=2)}
BATCHES = (256, 192, 128, 96, 64, 48, 32, 24, 16, 8)
# Bytes a parameter takes in training (itself, EMA, two moments, gradient), and those of a training
# step that are kept for the backward pass, for an image, token, block and unit of width: what the
# compiler counts for v5e is 100 (docs/performance.md, "Attention on TPU").
STATE_BYTES, KEPT_BYTES, SHARE = 20, 110, 0.85
PERIOD = 1_000_003


def config_of(size: str, pyramid: Pyramid, tiny: bool) -> ModelConfig:
    """32x32x4 latents and 1,000 classes; tiny: 8x8x4 and 10."""
    if tiny:
        return ModelConfig(pyramid, 8, 4, **TINY[size], num_classes=10)
    return ModelConfig(pyramid, 32, 4, **SIZES[size], num_classes=1000)


def random_params(model: ModelConfig) -> Params:
    """Normal weights on the default device, so that every part of the network shows.

    A line of random numbers, repeated: quickly compiled, and its period is prime, so that no two
    blocks are the same.
    """
    shapes, tree = jax.tree.flatten(abstract_params(model))
    line = 0.02 * np.random.default_rng(0).standard_normal(PERIOD, np.float32)

    def leaf(line: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        size = math.prod(shape)
        return jnp.tile(line, -(-size // PERIOD))[:size].reshape(shape)

    @jax.jit
    def made(line: jax.Array) -> Params:
        return jax.tree.unflatten(tree, [leaf(line, s.shape) for s in shapes])

    return made(line)


def network(model: ModelConfig) -> Apply:
    """For passes in bfloat16."""
    programs = for_passes("auto", jnp.bfloat16, head=model.head_width)
    return make_apply(model, dtype=jnp.bfloat16, programs=programs)


def fitting(model: ModelConfig, memory: float | None, share: float = SHARE) -> list[int]:
    """Batches of a training step by decreasing size, the first that should fit and those below.

    Args:
      memory: bytes of the device; None: unknown, and 8 images are tried.
      share: of the memory that may be used.
    """
    if memory is None:
        return [8]
    weights = STATE_BYTES * sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))
    rows, columns = model.pyramid.grid(len(model.pyramid) - 1, model.latent_size)
    image = KEPT_BYTES * rows * columns * model.depth * model.width
    return [b for b in BATCHES if weights + b * image <= share * memory] or [8]


def card_of(model: ModelConfig) -> Card:
    return Card(model, Flow(), "latents")


def euler(model: ModelConfig, steps: int, *scales: float) -> Plan:
    """Euler steps; one guidance scale, or one of every stage."""
    return make_plan(card_of(model), SamplerConfig("euler", steps, cfg=scales))


def tuned(model: ModelConfig, counts: tuple[int, ...], scales: tuple[float, ...]) -> Plan:
    """The plan of so many steps of every stage that `ppflow tune` begins with: of the same cost as
    the fitted one, and random weights have no other."""
    weights = Weights(
        card_of(model), Path("random"), "ema", functools.partial(random_params, model)
    )
    fitted = start_of(Field(Model(weights)), scales, counts)
    config = SamplerConfig(FITTED, len(fitted.stages), cfg=scales)
    return Plan(model, Flow(), config, fitted.segments)


def sampler(plan: Plan, params: Params, batch: int) -> Any:
    """A call of `plan`, one program, that gives latents of `batch` images: (call, compiled)."""
    made = plan.sampler(network(plan.model))
    whole = jax.jit(lambda params, x, y: made(params, x, y))
    noise = jax.random.normal(jax.random.key(1), (batch, *plan.model.shape))
    labels = jnp.arange(batch, dtype=jnp.int32) % plan.model.num_classes
    compiled = whole.lower(params, noise, labels).compile()
    return (lambda: compiled(params, noise, labels)), compiled
