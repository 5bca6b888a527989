"""Boundaries from the spectrum of the data."""

import numpy as np
import pytest

from ppflow_jax.errors import InputError
from ppflow_jax.pyramid import Pyramid
from ppflow_jax.tune.spectrum import above, mean_power, proposed
from tests import commands


def save(folder, x):
    np.save(folder / "latents.npy", np.float32(x))
    np.save(folder / "labels.npy", np.zeros(len(x), np.int32))


def test_noise_of_known_strength_rises_above_the_noise_at_its_time(tmp_path):
    """Data of power 9 above 4x4's limit: t = 1 / (1 + 3) on the linear path."""
    noise = np.random.default_rng(0).normal(size=(512, 8, 8, 2))
    modes = np.fft.fft2(noise, axes=(1, 2))
    strength = np.where(above((4, 4), (8, 8)), 3.0, 100.0)[None, :, :, None]
    save(tmp_path, np.fft.ifft2(modes * strength, axes=(1, 2)).real)
    text = proposed(str(tmp_path), "4x4,2x2")
    assert text.splitlines()[1].split()[-1] == "0.25"
    assert Pyramid.parse(text.splitlines()[-1].split("=", 1)[1]) == Pyramid.parse("4x4@0.25,2x2@1")


def test_power_is_that_of_white_noise_per_mode():
    x = np.random.default_rng(0).normal(size=(2000, 4, 6, 1))
    np.testing.assert_allclose(mean_power(iter([(x, 0.0)])), 1, atol=0.12)
    np.testing.assert_allclose(mean_power(iter([(0 * x, 0.5)])), 0.5)


def test_a_token_carries_what_is_up_to_its_nyquist_frequency():
    assert above((1, 1), (8, 8)).sum() == 0
    assert not above((2, 2), (8, 8))[2, 2] and above((2, 2), (8, 8))[3, 0]
    wide = above((2, 4), (8, 8))  # rows, columns
    assert not wide[2, 1] and wide[0, 2]


def test_a_level_whose_band_rises_no_later_is_left_out(tmp_path):
    """White data: all bands at t = 0.5, to the rounding of the boundaries."""
    save(tmp_path, np.random.default_rng(0).normal(size=(2000, 8, 8, 1)))
    text = proposed(str(tmp_path), "8x8,4x4,2x2")
    assert "--config.model.pyramid=8x8@0.5,2x2@1" in text and "1 level(s) left out" in text


@pytest.mark.parametrize(
    ("data", "patches", "words"),
    [
        ("digits", "2x2,4x4", "each finer"),
        ("digits", "4x4", "two or more"),
        ("digits", "4x4,banana", "write WIDTHxHEIGHT"),
        ("digits", "3x3,1x1", "does not divide 8x8"),
        ("nowhere", "4x4,2x2", "write digits"),
    ],
)
def test_bad_data_and_patches(data, patches, words):
    with pytest.raises(InputError, match=words):
        proposed(data, patches)


def test_the_command_needs_a_model_or_data():
    code, out, err = commands.run("tune.__main__", "--data=digits", "--patches=4x4,2x2")
    assert code == 0 and "--config.model.pyramid=4x4@0.58,2x2@1" in out, err
    code, _, err = commands.run("tune.__main__")
    assert code == 2 and "--checkpoint or --data" in err
