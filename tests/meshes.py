"""One training step on one device and on eight, as data, fsdp and tensor of two each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppflow_jax.devices.sharding import leaf_path, make_mesh
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.program import make_program
from tests.systems.checks import random_params


class Step(NamedTuple):
    """Metrics, and Adam's first moments after the first step: a tenth of the gradients."""

    metrics: dict[str, float]
    gradients: Any


def smaller(model) -> Any:
    """Random weights; whole, they make gradients of norm 1,700, in which rounding grows to 3e-4."""
    return jax.tree.map(lambda leaf: leaf / 3, random_params(model))


def one_and_eight(
    experiment: Experiment, params: Any = None, frozen: Mapping[str, Any] = {}
) -> tuple[Step, Step]:
    """The step of `experiment` from `params` (None: all of `smaller`), on 32 random images."""
    model, key = experiment.card.model, jax.random.key(0)
    params = jax.device_get(smaller(model) if params is None else params)  # steps take theirs
    x = jax.random.normal(key, (32, *model.shape))
    batch = {"x": x, "label": jnp.arange(32) % model.num_classes}
    found = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        devices = jax.devices()[: int(np.prod(sizes))]
        program = make_program(experiment, make_mesh(*sizes, devices=devices))
        start = jax.tree.map(jnp.zeros_like, program.init(key)) | {"params": params}
        state = jax.device_put(start, program.shardings)
        still = jax.device_put(dict(frozen), program.frozen_shardings)
        state, metrics = program.step(0)(state, batch, key, still)
        gradients = jax.device_get(optax.tree.get(state["opt_state"], "mu"))
        found.append(Step({k: float(v) for k, v in metrics.items()}, gradients))
    return found[0], found[1]


def check_alike(one: Step, eight: Step, zero: Sequence[str] = ()) -> None:
    """Metrics within 1e-5, gradients within 1e-4 of each leaf's largest, which is not 0.

    Args:
      zero: patterns of the leaves that have no gradient.
    """
    assert one.metrics == pytest.approx(eight.metrics, rel=1e-5)
    leaves = jax.tree_util.tree_leaves_with_path(one.gradients)
    for (path, a), b in zip(leaves, jax.tree.leaves(eight.gradients), strict=True):
        name = leaf_path(path)
        if any(re.search(pattern, name) for pattern in zero):
            assert not a.any() and not b.any(), name
            continue
        assert np.abs(a).max() > 0, name
        assert np.abs(a - b).max() < 1e-4 * np.abs(a).max(), name
