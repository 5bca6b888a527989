"""Image k is the same array for any grouping, batch or device count; labels by rule."""

import jax
import numpy as np
import pytest

from ppflow_jax.autoencoders.autoencoder import Autoencoder
from ppflow_jax.autoencoders.decode import Decoder
from ppflow_jax.autoencoders.taesd import TAESDConfig
from ppflow_jax.checkpoints.card import Card
from ppflow_jax.data.classes import Classes
from ppflow_jax.devices.sharding import AXES, local_mesh
from ppflow_jax.errors import InputError, RunError
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.generate import images
from ppflow_jax.generate.images import Generator, choose_labels
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import abstract_params, make_apply
from ppflow_jax.pyramid import Pyramid
from tests.compilations import compilations

MODEL = ModelConfig(
    Pyramid.parse("4x4@0.5,2x2@1"), 8, 4, 32, 1, 2, num_classes=5, learn_sigma=False
)
CARD = Card(MODEL, Flow(), "latents")
LABELS = np.arange(20, dtype=np.int32) % 5
IDS = np.arange(20, dtype=np.int32)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), abstract_params(MODEL)
    )


def one_device():
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    return jax.sharding.Mesh(devices, AXES, axis_types=local_mesh().axis_types)


def make(solver="heun", microbatch=2):
    config = SamplerConfig(solver, 4, cfg=(1.0, 2.0))
    autoencoder = Autoencoder(TAESDConfig(width=8))
    decoder = Decoder(CARD, autoencoder, autoencoder.init(0))
    sampler = Sampler(make_apply(MODEL), MODEL, CARD.flow, config)
    return Generator(sampler, decoder, microbatch=microbatch)


def gather(parts):
    return tuple(np.concatenate(arrays) for arrays in zip(*parts))


@pytest.fixture(scope="module")
def eight(params):
    """A generator on eight devices and its twenty images."""
    generator = make("sde-euler")
    return generator, gather(generator(params, IDS, LABELS, seed=3))


def test_all_images_in_order(eight):
    _, (ids, latents, pictures) = eight
    np.testing.assert_array_equal(ids, IDS)
    assert latents.shape == (20, 8, 8, 4) and latents.dtype == np.float32
    assert pictures.shape == (20, 64, 64, 3) and pictures.dtype == np.uint8
    assert len(np.unique(latents.reshape(20, -1), axis=0)) == 20


def test_one_device_makes_the_arrays_of_eight(eight, params, monkeypatch):
    monkeypatch.setattr(images, "local_mesh", one_device)
    generator = make("sde-euler")
    assert (eight[0].group, generator.group) == (16, 2)
    for ours, theirs in zip(gather(generator(params, IDS, LABELS, seed=3, batch=7)), eight[1]):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.bits
def test_an_image_does_not_depend_on_those_beside_it(eight, params):
    generator, (_, latents, pictures) = eight
    chosen = np.int32([19, 4, 7])
    part = gather(generator(params, chosen, LABELS[chosen], seed=3))
    np.testing.assert_array_equal(part[1], latents[chosen])
    np.testing.assert_array_equal(part[2], pictures[chosen])


def test_one_program_for_all_calls(eight, params):
    """Also for other labels, seeds, noise and guidance scales."""
    generator, (_, latents, _) = eight
    scales = tuple(np.where(s == 2, np.float32(5), s) for s in generator.scales)
    with compilations() as found:
        gather(generator(params, IDS[:3], LABELS[:3], seed=9))
        gather(generator(params, IDS, LABELS[::-1], latents, seed=2**32 - 1))
        other = gather(generator(params, IDS, LABELS, seed=3, scales=scales))[1]
    assert np.abs(other - latents).max() > 1e-3
    assert not found
    with compilations() as found:
        gather(make("heun")(params, IDS[:3], LABELS[:3]))
    assert found


def test_devices_do_not_talk():
    """Guidance doubles the batch, also of a network that is nothing but a factor."""

    def apply(params, x, t, y, stage):
        return params["factor"] * x + y[:, None, None, None]

    sampler = Sampler(apply, MODEL, CARD.flow, SamplerConfig("euler", 2, cfg=(2.0,)))
    generator, rows = Generator(sampler, Decoder(CARD)), np.zeros(128, np.int32)
    noise, keys = jax.eval_shape(generator.drawn, np.zeros(128, np.uint32), rows)
    given = {"factor": np.float32(1)}, None, generator.scales, noise, rows, keys
    text = generator.compiled.lower(*given).compile().as_text()
    collectives = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    assert "s32[16]" in text  # each of eight devices has its part of the labels
    assert not [c for c in collectives if c in text]


def test_weights_that_diverged(eight, params):
    broken = jax.tree.map(lambda x: x * np.nan, params)
    with pytest.raises(RunError, match=r"3 of 3 images are not finite \(numbers 0 to 2\)"):
        list(eight[0](broken, IDS[:3], LABELS[:3]))


def test_a_microbatch_below_one():
    with pytest.raises(InputError, match="at least 1 image at once, not 0"):
        make(microbatch=0)


def test_balanced_labels():
    labels = choose_labels("balanced", 23, 5, seed=1)
    assert labels.dtype == np.int32 and labels[:6].tolist() == [0, 1, 2, 3, 4, 0]
    assert set(np.bincount(labels)) == {4, 5}


def test_uniform_labels_depend_on_the_seed_and_the_number_alone():
    labels = choose_labels("uniform", 5000, 5, seed=1)
    np.testing.assert_array_equal(choose_labels("uniform", 50, 5, seed=1), labels[:50])
    assert (choose_labels("uniform", 5000, 5, seed=2) != labels).any()
    # Chi-squared with 4 degrees of freedom is over 23.5 once in 10,000.
    assert ((np.bincount(labels) - 1000) ** 2 / 1000).sum() < 23.5


def test_given_labels():
    assert choose_labels("3,5", 5, 5, seed=0).tolist() == [3, 5, 3, 5, 3]  # 5 is the null class
    for rule, words in {"6": "has 6", "-1": "has -1", "one": "write numbers", "": "write"}.items():
        with pytest.raises(InputError, match=words):
            choose_labels(rule, 5, 5, seed=0)


def test_labels_of_what_the_model_was_trained_on():
    known = Classes({2: 5, 7: 1}, ())
    assert choose_labels("balanced", 5, 10, 0, known).tolist() == [2, 7, 2, 7, 2]
    uniform = choose_labels("uniform", 500, 10, 0, known)
    assert set(uniform.tolist()) == {2, 7} and abs((uniform == 2).mean() - 0.5) < 0.1
    every = choose_labels("uniform", 500, 10, 0, Classes({k: 1 for k in range(10)}))
    np.testing.assert_array_equal(every, choose_labels("uniform", 500, 10, 0))
    named = Classes({0: 1, 1: 1, 2: 1}, ("cat", "dog", "10"))
    assert choose_labels("dog, 0,cat", 3, 3, 0, named).tolist() == [1, 0, 0]
    with pytest.raises(InputError, match="has 'cow': write numbers or names such as cat"):
        choose_labels("cow", 3, 3, 0, named)
    with pytest.raises(InputError, match="has 10: the model has classes 0 to 2"):
        choose_labels("10", 3, 3, 0, named)
