from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.flow.likelihood import log_likelihood
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler, image_noise
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3
from tests.acceptance.parity import Case, load, max_abs, nhwc

REFERENCE = Path(__file__).parents[1] / "reference"
POINTS = ModelConfig(PPFLOW3, latent_size=4, channels=1, width=4, depth=1, heads=1, num_classes=3)
NOISE = jax.random.normal(jax.random.key(3), (4, 4, 4, 1))
LABELS = jnp.array([0, 1, 2, 3])


def field(params, x, t, y, stage):
    """Stands in for the network: differs by stage, time and label."""
    return (stage + 1) * jnp.cos(t)[:, None, None, None] * x + 0.1 * y[:, None, None, None]


def sample(config, noise=NOISE, labels=LABELS, apply=field, **options):
    return Sampler(apply, POINTS, Flow(), config)({}, noise, labels, **options)


def test_heun_keeps_its_order_on_a_pyramid():
    """Against the exact solution of a random network; the PyTorch code has 5e-2 at 51 points."""
    case, ref = Case(REFERENCE / "ppflow_l2"), load(REFERENCE / "ppflow_l2" / "ode.npz")
    exact = nhwc(ref["exact_nocfg"][-1])
    z, y = nhwc(ref["z"]), ref["y"]

    def error(steps, grid):
        config = SamplerConfig("heun", steps, grid)
        return max_abs(Sampler(case.apply, case.config, Flow(), config)(case.params, z, y), exact)

    coarse, fine = (error(n, "aligned") for n in (26, 52))
    assert coarse / fine > 3 and fine < 2e-3  # 4 is second order
    assert error(51, "reference") > 10 * fine


@pytest.mark.parametrize("solver", ["euler", "heun", "sde-euler", "dopri5"])
def test_scale_one_never_evaluates_the_null_class(solver):
    seen = []

    def apply(params, x, t, y, stage):
        seen.append((stage, x.shape[0]))
        return field(params, x, t, y, stage)

    keys = jax.random.split(jax.random.key(0), 4)
    sample(SamplerConfig(solver, 6, cfg=(1.0, 2.0, 1.0)), apply=apply, keys=keys)
    one = 1 if solver == "dopri5" else 4  # the adaptive solver treats every image alone
    assert set(seen) == {(0, one), (1, 2 * one), (2, one)}


def test_guidance_extrapolates_and_can_be_kept_to_some_channels():
    model = ModelConfig(
        PPFLOW2, latent_size=4, channels=2, width=4, depth=1, heads=1, num_classes=3
    )

    def apply(params, x, t, y, stage):
        return jnp.where(y[:, None, None, None] == 3, 1.0, 2.0) * jnp.ones_like(x)

    noise, labels = jnp.zeros((1, 4, 4, 2)), jnp.array([0])
    for channels, expected in ((0, [4.0, 4.0]), (1, [4.0, 2.0])):
        config = SamplerConfig("euler", 2, cfg=(3.0,), cfg_channels=channels)
        out = Sampler(apply, model, Flow(), config)({}, noise, labels)
        np.testing.assert_allclose(out[0, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_autoguidance_takes_a_weaker_network_for_the_null_class(solver):
    seen = []

    def weak(params, x, t, y, stage):
        seen.append(stage)
        return 0.5 * field({}, x, t, y, stage) + params["bias"]

    model = replace(POINTS, pyramid=PPFLOW2)
    config = SamplerConfig(solver, 8, cfg=(1.0, 2.0))
    params = {"bias": jnp.full((1, 1, 1, 1), 0.25)}
    run = Sampler(field, model, Flow(), config, weak=weak)
    out = run({}, NOISE, LABELS, weak=params)
    assert set(seen) == {1}

    def combined(_, x, t, y, stage):
        good = field({}, x, t, y, stage)
        return good if stage != 1 else 2 * good - (0.5 * good + 0.25)

    plain = Sampler(combined, model, Flow(), SamplerConfig(solver, 8))({}, NOISE, LABELS)
    np.testing.assert_allclose(out, plain, rtol=1e-5, atol=1e-5)


def test_dopri5_agrees_with_many_small_steps():
    precise = sample(SamplerConfig("rk4", 96))
    adaptive = sample(SamplerConfig("dopri5", rtol=1e-6, atol=1e-7))
    np.testing.assert_allclose(adaptive, precise, rtol=1e-4, atol=1e-5)


@pytest.mark.bits
def test_trajectory_starts_at_the_noise_and_ends_at_the_sample():
    config = SamplerConfig("heun", 7)
    states = sample(config, trajectory=True)
    assert states.shape == (8, *NOISE.shape)
    np.testing.assert_array_equal(states[0], NOISE)
    np.testing.assert_array_equal(states[-1], sample(config))


def test_image_k_is_a_function_of_seed_and_k():
    whole, keys = image_noise(5, np.arange(6), (4, 4, 1))
    part, part_keys = image_noise(5, np.array([4, 1]), (4, 4, 1))
    np.testing.assert_array_equal(part, whole[np.array([4, 1])])
    config = SamplerConfig("sde-heun", 6)
    all_images = sample(config, whole, jnp.zeros(6, jnp.int32), keys=keys)
    two = sample(config, part, jnp.zeros(2, jnp.int32), keys=part_keys)
    np.testing.assert_allclose(two, all_images[np.array([4, 1])], rtol=1e-5, atol=1e-6)
    assert not np.array_equal(whole[0], image_noise(6, np.arange(1), (4, 4, 1))[0][0])


def test_eight_devices_sample_what_one_does():
    noise, keys = image_noise(0, np.arange(16), (4, 4, 1))
    labels, config = jnp.arange(16) % 3, SamplerConfig("sde-euler", 6, cfg=(1.0, 2.0, 2.0))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.P("data"))
    spread = sample(
        config, *jax.device_put((noise, labels), place), keys=jax.device_put(keys, place)
    )
    assert len(spread.sharding.device_set) == 8
    np.testing.assert_allclose(
        spread, sample(config, noise, labels, keys=keys), rtol=1e-6, atol=1e-6
    )


def test_one_compilation_per_segment_and_none_later():
    run = Sampler(field, POINTS, Flow(), SamplerConfig("heun", 8))
    for k in range(3):
        run({}, NOISE + k, LABELS)
    assert run.compiled._cache_size() == 3


def test_likelihood_of_a_gaussian_is_exact():
    # v = a x carries N(0, 1) to N(0, e^2a): log p(x) is known, and e.J e = a |e|^2 has no noise
    a, size = 0.4, 16

    def apply(params, x, t, y, stage):
        return a * x

    x = 1.3 * NOISE
    logp, z = log_likelihood(
        apply, POINTS, Flow(), SamplerConfig("rk4", 12), {}, x, LABELS, jax.random.key(0)
    )
    np.testing.assert_allclose(z, x * np.exp(-a), rtol=1e-5)
    squares = np.sum(np.square(x), axis=(1, 2, 3))
    expected = -0.5 * (squares * np.exp(-2 * a) + size * np.log(2 * np.pi)) - size * a
    np.testing.assert_allclose(logp, expected, rtol=1e-5)
