"""Jumps over intervals, and guidance that the network is told: what the sampler knows by itself."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppflow_jax.errors import InputError
from ppflow_jax.flow.cost import sampling_flops
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig, evaluations, plan
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.flow.segments import segments_of
from ppflow_jax.generate.explain import explain
from ppflow_jax.models.conditions import Channels, Scalar
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.parts import Execution
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated, with_preset
from tests.systems.checks import compiled, random_params

SMALL = ModelConfig(PPFLOW2, 8, 4, width=16, depth=2, heads=2, num_classes=5)
JUMPS = replace(SMALL, conditions=(Scalar("interval", scale=1.0),))
FORECAST = "forecast=taylor"
STUDENT = replace(SMALL, conditions=(Scalar("guidance"),))


@pytest.mark.parametrize(
    ("pyramid", "steps", "times", "stages"),
    [
        (SIT, 1, (0, 1), (0,)),
        (PPFLOW2, 1, (0, 1), (0,)),
        (PPFLOW2, 2, (0, 0.5, 1), (0, 1)),
        (PPFLOW2, 4, (0, 0.25, 0.5, 0.75, 1), (0, 0, 1, 1)),
        (PPFLOW3, 1, (0, 1), (0,)),
        (PPFLOW3, 2, (0, 0.75, 1), (0, 2)),
        (PPFLOW3, 3, (0, 0.5, 0.75, 1), (0, 1, 2)),
    ],
)
def test_the_stage_of_a_jump_is_where_it_starts(pyramid, steps, times, stages):
    segments = plan(SamplerConfig("meanflow", steps), pyramid, Flow())
    assert (*(s.times[0] for s in segments), 1) == tuple(
        t for i, t in enumerate(times) if i in (0, len(stages)) or stages[i] != stages[i - 1]
    )
    assert tuple(s.stages[0] for s in segments for _ in range(s.steps)) == stages
    assert evaluations(segments) == steps and {s.kind for s in segments} == {"jump"}


def slope_to(t, length):
    """Average velocity of z_t = z_0 (1 + t^2), over z_t."""
    return ((1 + (t + length) ** 2) / (1 + t**2) - 1) / length


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_jumps_of_known_averages_end_where_the_flow_does(steps):
    seen = []

    def apply(params, x, t, y, stage):
        seen.append(stage)
        return slope_to(t, y["interval"])[:, None, None, None] * x

    noise = jax.random.normal(jax.random.key(0), (3, *SMALL.shape))
    sampler = Sampler(apply, JUMPS, Flow(), SamplerConfig("meanflow", steps))
    out = sampler({}, noise, jnp.arange(3))
    np.testing.assert_allclose(out, 2 * noise, rtol=1e-5)
    assert set(seen) == ({0} if steps == 1 else {0, 1})


def test_other_solvers_take_the_velocity_itself():
    def apply(params, x, t, y, stage):
        return jnp.where(y["interval"][:, None, None, None] == 0, x, jnp.nan)

    noise = jnp.ones((2, *SMALL.shape))
    for solver in ("heun", "ab2", "sde-euler", "dopri5"):
        sampler = Sampler(apply, JUMPS, Flow(), SamplerConfig(solver, 8))
        keys = jax.random.split(jax.random.key(0), 2)
        assert np.isfinite(sampler({}, noise, jnp.arange(2), keys)).all(), solver


def test_the_network_is_told_the_scale_and_evaluates_no_null_class():
    calls = []

    def apply(params, x, t, y, stage):
        calls.append((stage, len(x)))
        return x * 0 + y["guidance"][:, None, None, None]

    noise = jnp.zeros((2, *SMALL.shape))
    sampler = Sampler(apply, STUDENT, Flow(), SamplerConfig("euler", 4, cfg=(1.0, 3.5)))
    out = sampler({}, noise, jnp.arange(2))
    np.testing.assert_allclose(out, 0.5 * 0 + 0.5 * 2.5, rtol=1e-6)
    assert {size for _, size in calls} == {2}
    # Scales of a request take the place of the plan's
    scales = tuple(np.full_like(s, 2.0) for s in (np.ones((2, 1)), np.ones((2, 1))))
    np.testing.assert_allclose(sampler({}, noise, jnp.arange(2), scales=scales), 1, rtol=1e-6)
    plain = segments_of(SamplerConfig("euler", 4, cfg=(1.0, 3.5)), SMALL, Flow())
    told, halved = (sampling_flops(m, s) for m, s in ((STUDENT, sampler.segments), (SMALL, plain)))
    unguided = sampling_flops(STUDENT, segments_of(SamplerConfig("euler", 4), STUDENT, Flow()))
    assert told == unguided < halved
    text = explain(sampler, STUDENT, 1)
    assert "embedded 3.5" in text and "guided everywhere" in text


def test_a_network_without_what_the_sampler_knows_takes_zero():
    model = replace(SMALL, conditions=(Scalar("interval"), Scalar("guidance"), Channels("low")))
    params = random_params(model)
    x, low = (jax.random.normal(jax.random.key(i), (2, *SMALL.shape)) for i in range(2))
    apply = compiled(model)
    y = {"label": jnp.arange(2), "low": low}
    zero = jnp.zeros(2)
    one = apply(params, x, jnp.full(2, 0.3), y, 0)
    other = apply(params, x, jnp.full(2, 0.3), y | {"interval": zero, "guidance": zero}, 0)
    np.testing.assert_array_equal(one, other)
    moved = apply(params, x, jnp.full(2, 0.3), y | {"interval": zero + 0.5}, 0)
    assert np.abs(moved - one).max() > 1e-3
    with pytest.raises(InputError, match="conditions are interval, guidance, low"):
        apply(params, x, jnp.full(2, 0.3), jnp.arange(2), 0)


def test_close_intervals_are_told_apart_whatever_the_dtype():
    values, found = jnp.float32([0.5, 0.501]), []
    for dtype in (jnp.float32, jnp.bfloat16):
        module = JUMPS.conditions[0].module(JUMPS, Execution(dtype), nnx.Rngs(0))
        module.kernel[...] = jax.random.normal(jax.random.key(0), module.kernel.shape)
        found.append(JUMPS.conditions[0].vector(module, values))
    np.testing.assert_array_equal(*found)
    assert np.abs(found[0][0] - found[0][1]).max() > 1e-3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: segments_of(SamplerConfig("meanflow", 2), SMALL, Flow()), "trained with the obj"),
        (
            lambda: segments_of(SamplerConfig("meanflow", 2, cfg=(2.0,)), JUMPS, Flow()),
            "guidance from training: leave cfg out, not 2",
        ),
        (lambda: SamplerConfig("meanflow", 2, "reference"), "leave grid=aligned"),
        (
            lambda: segments_of(SamplerConfig(cfg=(2.0,), cfg_channels=3), STUDENT, Flow()),
            "leave cfg_channels out",
        ),
        (
            lambda: accelerated(
                SamplerConfig("meanflow", 4),
                JUMPS,
                Flow(),
                AccelerateConfig.parse("forecast=taylor"),
            ),
            "leave forecast out",
        ),
        (lambda: with_preset(SamplerConfig("meanflow", 4), "fast", JUMPS), "not meanflow"),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
