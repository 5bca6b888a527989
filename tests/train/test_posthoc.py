"""Averages whose length is chosen after training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.checkpoints.card import Base, Card
from ppflow_jax.devices.sharding import leaf_path
from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import init_params, make_apply
from ppflow_jax.models.trees import split
from ppflow_jax.pyramid import SIT
from ppflow_jax.train.optimizer import OptimConfig, make_optimizer
from ppflow_jax.train.posthoc import (
    POSTHOC,
    Profile,
    Snapshots,
    begin,
    check_widths,
    combination,
    exponent,
    rate,
    updated,
)
from ppflow_jax.train.skip import no_counts
from ppflow_jax.train.state import init_state
from ppflow_jax.train.step import make_train_step
from tests import commands

MODEL = ModelConfig(SIT, latent_size=8, channels=1, width=16, depth=1, heads=2, num_classes=10)
WIDTHS = (0.05, 0.1)


def weights_of(sigma, t, dtype=np.float64):
    """Of theta(1), ..., theta(t) in the average: those of a power function, by their sum."""
    edges = (np.arange(t + 1, dtype=dtype) / t) ** (exponent(sigma) + 1)
    return np.diff(edges)


@pytest.mark.parametrize(("sigma", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.15, 3.56)])
def test_widths_and_exponents_are_those_of_the_paper(sigma, gamma):
    """Its section 3.1 quotes the first two; the width is a standard deviation, here by sums."""
    assert exponent(sigma) == pytest.approx(gamma, abs=0.01)
    t = np.arange(1, 200_001) / 200_000
    weights = weights_of(sigma, len(t))
    mean = weights @ t
    assert np.sqrt(weights @ (t - mean) ** 2) == pytest.approx(sigma, rel=1e-4)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.28])
def test_tracking_gives_the_weights_of_a_power_function(sigma):
    share, found = jax.jit(lambda t: rate(sigma, t)), np.zeros(40)
    for t in range(1, 41):
        now = float(share(jnp.int32(t)))
        found *= 1 - now
        found[t - 1] = now
    np.testing.assert_allclose(found, weights_of(sigma, 40), rtol=1e-4, atol=1e-7)
    late = float(share(jnp.int32(400_000)))  # float32 keeps it
    assert late == pytest.approx((exponent(sigma) + 1) / 400_000, rel=1e-4)


def tracked(steps, widths, lr=1e-2):
    """Parameters and averages of a layer after every step of a small run."""
    tx = make_optimizer(OptimConfig(lr=lr), 9)
    state = init_state(MODEL, tx, jax.random.key(0))
    state = state | {POSTHOC: begin(state["params"], widths)}
    step = jax.jit(make_train_step(FlowObjective(SIT, Flow(), 10), make_apply(MODEL), tx, ema=0.9))
    x = jax.random.normal(jax.random.key(1), (8, 8, 8, 1))
    trees = []
    for _ in range(steps):
        state, _ = step(state, {"x": x, "label": jnp.arange(8)}, jax.random.key(2))
        every = {"params": state["params"]} | state[POSTHOC]
        trees.append({n: np.asarray(t["blocks"]["fc1"]["kernel"]) for n, t in every.items()})
    return trees


def combined(trees, sigma, every):
    times = range(every, len(trees) + 1, every)
    kept = [(s, t) for s in WIDTHS for t in times]
    profiles = [Profile(exponent(s), t) for s, t in kept]
    weights, missed = combination(profiles, Profile(exponent(sigma), len(trees)))
    return sum(w * np.float64(trees[t - 1][str(s)]) for w, (s, t) in zip(weights, kept)), missed


def test_a_length_that_was_tracked_comes_out_of_two_others():
    trees = tracked(60, (*WIDTHS, 0.15, 0.07))
    last = trees[-1]
    for sigma in (0.15, 0.07):
        away = np.linalg.norm(last[str(sigma)] - last["params"])
        found, missed = combined(trees, sigma, every=5)
        assert np.linalg.norm(found - last[str(sigma)]) < 0.01 * away and 0 < missed < 0.02
        direct = np.tensordot(weights_of(sigma, 60), [tree["params"] for tree in trees], 1)
        assert np.linalg.norm(direct - last[str(sigma)]) < 1e-3 * away
        few, missed_more = combined(trees, sigma, every=30)
        assert missed_more > 5 * missed
        assert np.linalg.norm(few - last[str(sigma)]) > 5 * np.linalg.norm(found - last[str(sigma)])
    found, missed = combined(trees, 0.1, every=20)  # one that is there
    np.testing.assert_allclose(found, last["0.1"], rtol=1e-6, atol=1e-8)
    assert missed < 1e-6


def test_what_does_not_change_is_its_own_average():
    value = jax.random.normal(jax.random.key(0), (1000,))
    state = {"step": jnp.int32(0), POSTHOC: begin({"w": value, "terms": {"own": value}}, WIDTHS)}
    assert "terms" not in state[POSTHOC]["0.05"]
    for step in range(20):
        state = {"step": jnp.int32(step)} | updated(state, {"w": value})
    kept = [np.asarray(state[POSTHOC][str(s)]["w"]) for s in WIDTHS]
    for average in kept:
        np.testing.assert_array_equal(average, value)
    for sigma in (0.03, 0.2):
        profiles = [Profile(exponent(s), t) for s in WIDTHS for t in range(2, 21, 2)]
        weights, _ = combination(profiles, Profile(exponent(sigma), 20))
        assert np.abs(weights).max() > 0.3  # and some are negative
        total = sum(w * np.float64(value) for w in weights)
        np.testing.assert_array_equal(np.float32(total), value)


def test_a_step_that_is_left_out_is_no_update():
    one, two = jnp.ones(3), 2 * jnp.ones(3)
    state = {"step": jnp.int32(4), "skipped": no_counts() | {"total": jnp.int32(3)}}
    state |= {POSTHOC: {"0.1": {"w": one}}}
    found = updated(state, {"w": two})[POSTHOC]["0.1"]["w"]
    np.testing.assert_allclose(found, 1 + (1 - 0.5 ** (exponent(0.1) + 1)), rtol=1e-5)
    assert updated({"step": jnp.int32(4)}, {"w": two}) == {}


def test_a_snapshot_has_what_is_not_trained_too(tmp_path):
    params = init_params(MODEL, jax.random.key(0))
    trained, base = split(params, ("blocks/.*",))
    card = Card(
        MODEL, Flow(), "pixels", {"train": {"trainable": ["blocks/.*"]}}, base=Base("/", "")
    )
    Snapshots(tmp_path, card, (0.1,), 0).write(3, {POSTHOC: {"0.1": trained}}, {"base": base})
    loaded = commands.weights(tmp_path / POSTHOC / "0.1" / "step_0000003", "ema")
    assert loaded.keys() == {leaf_path(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        np.testing.assert_array_equal(loaded[leaf_path(path)], leaf)


@pytest.mark.parametrize("values", [(0,), (0.3,), (0.1, 0.1), ("x",), (float("nan"),)])
def test_what_is_no_width(values):
    with pytest.raises(InputError, match="config"):
        check_widths(values, "config.train.posthoc_ema")
