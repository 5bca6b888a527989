from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.metrics.kid import kid
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import make_apply
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.systems import registry
from ppflow_jax.systems.mmd import Mmd, kernel, mmd2
from ppflow_jax.train.step import make_train_step
from tests.systems import parity_mmd
from tests.systems.checks import random_params, within
from tests.systems_parity import Reference

FOLDER = Path(__file__).parents[1] / "reference" / "systems" / "mmd_elucd_dualparal"
MODEL = ModelConfig(PPFLOW2, latent_size=8, channels=1, width=16, depth=2, heads=2, num_classes=4)
BASE = FlowObjective(PPFLOW2, Flow(), MODEL.null_label)
APPLY = make_apply(MODEL)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda leaf: leaf / 2, random_params(MODEL))


def batch_of(size, seed=0):
    x = jax.random.normal(jax.random.key(seed), (size, *MODEL.shape))
    return {"x": x, "label": jnp.arange(size) % 4}


def test_kernels_and_estimates_are_those_of_the_public_code():
    found = list(parity_mmd.rows(Reference(FOLDER / "mmd_elucd_dualparal.npz")))
    assert len(found) == 9
    within(found)


def test_the_cubic_one_is_the_kernel_inception_distance():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 8)), rng.normal(1, 1, size=(13, 8))
    assert float(mmd2(jnp.float32(x), jnp.float32(y))) == pytest.approx(kid(x, y), rel=1e-5)


def test_of_one_distribution_it_is_zero_in_the_mean():
    """With the pairs of a sample with itself it is not."""
    sets = jax.random.normal(jax.random.key(0), (400, 2, 6, 5))
    each = jax.vmap(lambda xy: mmd2(xy[0], xy[1]))(sets)
    error = float(jnp.std(each)) / 20
    assert abs(float(jnp.mean(each))) < 3 * error

    def biased(xy):
        k = [jnp.mean(kernel("poly", 3, a, b)) for a, b in ((xy[0],) * 2, (xy[1],) * 2, xy)]
        return k[0] + k[1] - 2 * k[2]

    assert float(jnp.mean(jax.vmap(biased)(sets))) > 10 * error


def test_samples_are_those_of_the_sampler(params):
    objective = Mmd(steps=3, scale=2.0).on(BASE, MODEL)
    noise, labels = jax.random.normal(jax.random.key(1), (4, *MODEL.shape)), jnp.arange(4)
    ours = jax.jit(lambda p: objective.samples(APPLY, p, noise, labels))(params)
    config = SamplerConfig("euler", 3, cfg=(2.0,))
    theirs = jax.jit(Sampler(APPLY, MODEL, Flow(), config))(params, noise, labels)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_the_gradient_is_that_of_the_whole_way(params):
    """Against differences along a direction; the first step's parameters act through all others."""
    objective = Mmd(steps=2).on(BASE, MODEL)
    batch = batch_of(6)
    draws = objective.draw(jax.random.key(2), batch)
    loss = jax.jit(lambda p: objective.loss(APPLY, p, {"teacher": params}, batch, draws, {})[0])
    slope = jax.grad(loss)(params)
    assert np.abs(slope["patchify"][0]["kernel"]).max() > 0
    size = optax.tree.norm(slope)
    along = jax.tree.map(lambda g: g / size, slope)
    step = 1e-2
    ends = [loss(jax.tree.map(lambda p, d, s=s: p + s * step * d, params, along)) for s in (1, -1)]
    assert float(ends[0] - ends[1]) / (2 * step) == pytest.approx(float(size), rel=0.02)


@pytest.mark.long
def test_fine_tuning_brings_samples_to_the_data(params):
    """Ten updates, on noise that they have not seen."""
    objective = Mmd(steps=2).on(BASE, MODEL)
    tx = optax.adam(3e-3)
    step = jax.jit(make_train_step(objective, APPLY, tx, ema=0.9))
    state = {"params": params, "ema": params, "opt_state": tx.init(params), "step": jnp.int32(0)}
    batch, start = batch_of(16), params

    @jax.jit
    def judged(params):
        draws = objective.draw(jax.random.key(9), batch)
        return objective.loss(APPLY, params, {"teacher": start}, batch, draws, {})[0]

    before = judged(params)
    for _ in range(10):
        state, metrics = step(state, batch, jax.random.key(5), {"teacher": start})
    assert np.isfinite(metrics["loss"])
    assert judged(state["params"]) < 0.7 * before


def test_other_features_take_the_place_of_the_teachers(params):
    plain = Mmd(steps=2).on(BASE, MODEL)
    pixels = replace(plain, features=lambda apply, teacher, x, blur: x.reshape(len(x), -1))
    batch = batch_of(6)
    draws = pixels.draw(jax.random.key(2), batch)
    loss = lambda p: pixels.loss(APPLY, p, {"teacher": p}, batch, draws, {})
    (found, _), x = jax.jit(
        lambda p: (loss(p), pixels.samples(APPLY, p, draws.noise, draws.labels))
    )(params)
    ours = mmd2(x.reshape(6, -1), batch["x"].reshape(6, -1))
    assert float(found) == pytest.approx(float(ours), rel=1e-4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mmd:kernel=cubic", "kernel is one of poly, rbf"),
        ("mmd:steps=0", "steps and degree must be at least 1"),
        ("mmd:time=0", "time must be in"),
        ("mmd:block=3", "the model has 2 blocks"),
    ],
)
def test_what_is_wrong_is_said(text, words):
    with pytest.raises(InputError, match=words):
        registry.objective(text, BASE, MODEL)
    with pytest.raises(InputError, match="compares pairs"):
        Mmd().on(BASE, MODEL).check_batch(1, 1)


def test_models_of_more_than_classes_are_refused():
    moe = replace(MODEL, block=registry.take_block({"ffn": "moe:experts=2,top_k=1"}))
    with pytest.raises(InputError, match="is for plain models"):
        Mmd().on(BASE, moe)
