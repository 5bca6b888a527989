"""Multistep solvers in the sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.errors import InputError
from ppflow_jax.flow.fitted import stepwise
from ppflow_jax.flow.multistep import MULTISTEP, Past, multistep
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig, plan
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.pyramid import PPFLOW3

MODEL = ModelConfig(PPFLOW3, latent_size=4, channels=1, width=4, depth=1, heads=1, num_classes=3)
NOISE = jax.random.normal(jax.random.key(3), (4, 4, 4, 1))
LABELS = jnp.array([0, 1, 2, 3])
SCALES = (1.0, 2.0, 3.0)


def field(params, x, t, y, stage):
    """Stands in for the network: differs by stage, time and label."""
    return (stage + 1) * jnp.cos(t)[:, None, None, None] * x + 0.1 * y[:, None, None, None]


def by_hand(rows, times, stages):
    """All states, guided by the formula."""
    x, states = NOISE, [NOISE]
    past = Past.empty(x, rows.rule)
    weights, corrector = rows.tables
    for i, stage in enumerate(stages):

        def velocity(x, t, _, stage=stage):
            ts = jnp.full(len(x), t)
            c, u = (field({}, x, ts, y, stage) for y in (LABELS, jnp.full_like(LABELS, 3)))
            return u + SCALES[stage] * (c - u)

        row = weights[i], None if corrector is None else corrector[i]
        x, past = multistep(rows.rule, Flow(), velocity, x, jnp.float32(times[i]), row, past)
        states.append(x)
    return np.stack(states)


@pytest.mark.parametrize("solver", MULTISTEP)
def test_the_sampler_walks_the_rows_and_begins_anew_in_every_stage(solver):
    config = SamplerConfig(solver, 9, cfg=SCALES)
    segments = plan(config, PPFLOW3, Flow())
    times = [segments[0].times[0], *(t for s in segments for t in s.times[1:])]
    stages = [s.stages[0] for s in segments for _ in range(s.steps)]
    firsts = tuple(np.cumsum([s.steps for s in segments])[:-1].tolist())
    rows = MULTISTEP[solver](Flow(), np.float64(times), firsts)
    states = Sampler(field, MODEL, Flow(), config)({}, NOISE, LABELS, trajectory=True)
    np.testing.assert_allclose(states, by_hand(rows, times, stages), atol=2e-5)


def test_rows_may_look_across_a_boundary():
    times = np.float64(np.float32(np.linspace(0, 1, 9)))
    stages = tuple(PPFLOW3.stage_at(t) for t in (times[1:] + times[:-1]) / 2)
    rows = MULTISTEP["ab3"](Flow(), times)
    segments = stepwise(times, stages, SCALES, rows).segments
    assert [s.steps for s in segments] == [4, 2, 2]
    config = SamplerConfig("fitted", 8, cfg=SCALES)
    run = Sampler(field, MODEL, Flow(), config, segments=segments)
    states = run({}, NOISE, LABELS, trajectory=True)
    np.testing.assert_allclose(states, by_hand(rows, times, stages), atol=2e-5)
    anew = MULTISTEP["ab3"](Flow(), times, (4, 6))
    assert np.abs(np.asarray(states) - by_hand(anew, times, stages)).max() > 1e-3


def test_fitted_rows_come_from_a_file():
    with pytest.raises(InputError, match="plan file"):
        plan(SamplerConfig("fitted", 8), PPFLOW3, Flow())
