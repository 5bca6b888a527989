"""Steps that are left out because their loss or gradient is not finite."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.devices.sharding import (
    batch_sharding,
    layout,
    make_mesh,
    replicated,
    tree_shardings,
)
from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import make_apply
from ppflow_jax.pyramid import SIT
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.optimizer import OptimConfig, make_optimizer
from ppflow_jax.train.program import make_program
from ppflow_jax.train.skip import no_counts
from ppflow_jax.train.state import init_state
from ppflow_jax.train.step import make_train_step
from tests.test_configs import load

MODEL = ModelConfig(SIT, latent_size=8, channels=1, width=16, depth=1, heads=2, num_classes=10)
OBJECTIVE = FlowObjective(SIT, Flow(), 10)
BAD = 21  # the example that no step survives
SKIP = "--config.train.skip_nonfinite=1"


def steps_of(mesh, accumulate):
    tx = make_optimizer(OptimConfig(lr=1e-3), 9)
    make = lambda key: init_state(MODEL, tx, key) | {"skipped": no_counts()}
    key = jax.random.key(0)
    places = tree_shardings(jax.eval_shape(make, key), mesh)
    apply = make_apply(MODEL, layout=layout(mesh))
    step = make_train_step(OBJECTIVE, apply, tx, ema=0.9, accumulate=accumulate)
    given = (places, batch_sharding(mesh), replicated(mesh))
    run = jax.jit(step, in_shardings=given, out_shardings=(places, replicated(mesh)))
    return jax.jit(make, out_shardings=places)(key), run


@pytest.mark.parametrize(("devices", "accumulate"), [(1, 2), (8, 1)])
def test_a_bad_step_changes_nothing_but_the_counts(devices, accumulate):
    mesh = make_mesh(fsdp=devices, devices=jax.devices()[:devices])
    state, step = steps_of(mesh, accumulate)
    x = np.random.default_rng(0).normal(size=(16, 8, 8, 1)).astype(np.float32)
    good = {"x": x, "label": np.arange(16, dtype=np.int32) % 10}
    bad = good | {"x": np.where(np.arange(16).reshape(-1, 1, 1, 1) == 3, 1e30, x)}
    counts, before = [], None
    for batch in (good, bad, bad, good):
        before = jax.device_get(state)
        state, metrics = step(state, batch, jax.random.key(1))
        now = jax.device_get(state)
        counts.append((int(now["skipped"]["total"]), int(now["skipped"]["row"])))
        assert float(metrics["skipped"]) == counts[-1][0] and now["step"] == before["step"] + 1
        kept = ("params", "ema", "opt_state")
        same = jax.tree.map(np.array_equal, *({k: s[k] for k in kept} for s in (now, before)))
        assert jax.tree.all(same) == (batch is bad)
        assert not np.isfinite(metrics["loss"]) == (batch is bad)
        last, first = (s["params"]["unpatchify"][0]["kernel"] for s in (now, before))
        assert np.any(last != first) == (batch is good)
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 0)]


def test_a_gradient_that_is_not_finite_counts_too():
    """As where the loss is still a number."""
    state, _ = steps_of(make_mesh(devices=jax.devices()[:1]), 1)

    class Steep:
        def __getattr__(self, name):
            return getattr(OBJECTIVE, name)

        def loss(self, apply, params, frozen, batch, draws, weights):
            loss = jnp.sqrt(jnp.sum(jnp.square(params["final_adaln"]["kernel"])))  # at 0
            return loss, {"loss": loss}

    tx = make_optimizer(OptimConfig(lr=1e-3), 9)
    step = make_train_step(Steep(), make_apply(MODEL), tx, ema=0.9)
    batch = {"x": jnp.zeros((4, 8, 8, 1)), "label": jnp.zeros(4, jnp.int32)}
    new, metrics = jax.jit(step)(state, batch, jax.random.key(0))
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"])
    assert int(new["skipped"]["total"]) == 1
    jax.tree.map(np.testing.assert_array_equal, new["params"], state["params"])


def test_off_the_state_is_as_it_was():
    config, _ = load("digits.py:sit")
    trees = []
    for k in (0, 2):
        with config.unlocked():
            config.train.skip_nonfinite = k
        trees.append(make_program(Experiment.from_config(config), make_mesh()).abstract)
    assert sorted(trees[0]) == ["ema", "opt_state", "params", "step"]
    assert trees[1].keys() - trees[0].keys() == {"skipped"}


@pytest.mark.parametrize("value", [-1, True])
def test_what_is_no_number_of_steps(value):
    config, _ = load("digits.py")
    config.train.skip_nonfinite = value
    with pytest.raises(InputError, match="skip_nonfinite must be a whole number"):
        Experiment.from_config(config)
