from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.errors import InputError
from ppflow_jax.flow.cost import sampling_flops
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import make_apply
from ppflow_jax.pyramid import PPFLOW2, SIT
from ppflow_jax.systems.cascade import Cascade, Upsampling
from ppflow_jax.systems.registry import task
from ppflow_jax.systems.tasks import SuperResolution
from tests.systems.checks import random_params

TASK = Upsampling(noise=0.2)
LOW = ModelConfig(SIT, 4, 2, width=8, depth=1, heads=2, num_classes=4)
PLAIN = replace(LOW, latent_size=8, pyramid=PPFLOW2)
HIGH = replace(PLAIN, conditions=(TASK.for_model(PLAIN, "latents"),))


@pytest.fixture(scope="module")
def cascade():
    """How images are made from ids and labels, and of which parts."""
    config = SamplerConfig("euler", 2, cfg=(2.0,))
    samplers = tuple(Sampler(make_apply(m), m, Flow(), config) for m in (LOW, HIGH))
    params = tuple(jax.tree.map(lambda p: p / 2, random_params(m)) for m in (LOW, HIGH))
    made = Cascade(LOW, HIGH, TASK)
    return made, samplers, lambda ids, y: made.sample(samplers, params, 7, ids, jnp.asarray(y))


def test_an_image_is_a_matter_of_its_number_and_label(cascade):
    _, _, sample = cascade
    low, high = sample([3, 9, 4], [0, 1, 2])
    assert low.shape == (3, 4, 4, 2) and high.shape == (3, 8, 8, 2)
    again = sample([9, 3], [1, 3])
    for whole, part in zip((low, high), again):
        np.testing.assert_allclose(whole[1], part[0], atol=1e-5)
        assert np.abs(whole[0] - part[1]).max() > 1e-3  # another label


def test_the_second_model_is_told_what_the_first_made(cascade):
    made, samplers, sample = cascade
    low, high = sample([0, 1], [0, 1])
    told = TASK.told(low, 7, np.arange(2, dtype=np.int32))
    away = np.asarray(TASK.shrunk(told) - low)
    assert 0.1 < away.std() < 0.3  # of 0.2
    high_params = jax.tree.map(lambda p: p / 2, random_params(HIGH))
    others = jax.tree.map(lambda p: p / 3, random_params(LOW)), high_params
    another, changed = made.sample(samplers, others, 7, [0, 1], jnp.arange(2))
    assert np.abs(another - low).max() > 1e-3 and np.abs(changed - high).max() > 1e-3


def test_training_tells_what_sampling_does():
    """The mean of every square, with noise of the same size in all of its pixels."""
    x = jax.random.normal(jax.random.key(0), (500, 8, 8, 2))
    told = TASK(x, jax.random.key(1))
    noise = np.asarray(told - SuperResolution(2)(x, jax.random.key(1)))
    np.testing.assert_allclose(noise[:, ::2, ::2], noise[:, 1::2, 1::2], atol=1e-6)
    assert noise.std() == pytest.approx(0.2, rel=0.02)
    quiet = replace(TASK, noise=0.0)
    np.testing.assert_array_equal(
        quiet(x, jax.random.key(1)), SuperResolution(2)(x, jax.random.key(1))
    )


def test_noises_of_both_models_are_not_the_same():
    from ppflow_jax.systems import cascade

    seeds = {7, *(int(cascade._mixed(7, tag)) for tag in (1, 2, cascade._NOISE_OF_SECOND))}
    assert len(seeds) == 4
    assert cascade._NOISE_OF_SECOND != cascade._NOISE_OF_TOLD


def test_it_costs_what_both_cost(cascade):
    made, samplers, _ = cascade
    first, second = (s.segments for s in samplers)
    assert made.flops(first, second) == sampling_flops(LOW, first) + sampling_flops(HIGH, second)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        ({"latent_size": 8}, {}, "the second must have 16"),
        ({"channels": 3}, {}, "3 and 2 channels"),
        ({"num_classes": 5}, {}, "5 and 4 num_classes"),
        (
            {},
            {"conditions": ()},
            "with low alone, not none: train it with config.data.task=cascade",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused(low, high, words):
    with pytest.raises(InputError, match=words):
        Cascade(replace(LOW, **low), replace(HIGH, **high), TASK)


def test_settings_have_bounds():
    assert task("cascade:factor=4,noise=0").factor == 4
    for text in ("cascade:noise=-1", "cascade:factor=1"):
        with pytest.raises(InputError, match="must be at least"):
            task(text)
