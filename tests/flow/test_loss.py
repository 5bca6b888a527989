import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import Draws, FlowObjective, OnFlow, strided
from ppflow_jax.flow.path import (
    PATHS,
    PREDICTIONS,
    WEIGHTINGS,
    Flow,
    interpolate,
    score_from,
    velocity_from,
)
from ppflow_jax.models.conditions import Channels
from ppflow_jax.models.network import Output
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT, Pyramid


def test_strided_split_keeps_every_sample_once():
    objective = FlowObjective(PPFLOW3, Flow(), 10)
    assert objective.pattern == (0, 0, 1, 2)
    x = jnp.arange(12)
    parts = [strided(x, objective.pattern, s).tolist() for s in range(3)]
    assert parts == [[0, 1, 4, 5, 8, 9], [2, 6, 10], [3, 7, 11]]


def test_objectives_on_a_flow_take_its_batches_and_draws():
    objective = OnFlow()
    objective.base = FlowObjective(PPFLOW3, Flow(), 10, conditions=(Channels("low"),))
    assert objective.pattern == (0, 0, 1, 2) and objective.evaluated == ()
    assert objective.fields({}) == ("low",)
    objective.check_batch(8, 2)
    with pytest.raises(InputError, match="stage shares 2:1:1"):
        objective.check_batch(8, 4)
    x1 = jnp.ones((8, 2, 2, 1))
    batch = {"x": x1, "label": jnp.arange(8), "low": x1}
    key = jax.random.key(3)
    ours, theirs = objective.draw(key, batch), objective.base.draw(key, batch)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_split_needs_no_communication_on_a_sharded_batch():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    pattern = FlowObjective(PPFLOW3, Flow(), 10).pattern

    def means(x):
        return [jnp.sin(strided(x, pattern, stage)) for stage in range(3)]

    x = jax.ShapeDtypeStruct((64, 4), jnp.float32, sharding=sharding)
    text = jax.jit(means, out_shardings=sharding).lower(x).compile().as_text()
    assert not any(op in text for op in ("collective-permute", "all-gather", "all-to-all"))


def test_times_lie_in_their_stage_and_labels_are_dropped_at_the_rate(key):
    objective = FlowObjective(PPFLOW3, Flow(), 10, label_drop=0.25)
    x1 = jnp.zeros((4096, 2, 2, 1))
    draws = objective.draw(key, {"x": x1, "label": jnp.arange(4096) % 10})
    stages = np.array([PPFLOW3.stage_at(t) for t in np.asarray(draws.t)])
    wanted = np.tile(objective.pattern, 1024)
    # a draw of exactly the lower end is the boundary itself
    assert np.mean(stages == wanted) > 0.999
    assert np.mean(np.asarray(draws.labels) == 10) == pytest.approx(0.25, abs=0.03)
    kept = np.asarray(draws.labels) != 10
    assert (np.asarray(draws.labels)[kept] == (np.arange(4096) % 10)[kept]).all()
    for stage, (lo, hi) in enumerate(objective.time_ranges):
        t = np.asarray(draws.t)[wanted == stage]
        assert t.mean() == pytest.approx((lo + hi) / 2, abs=0.02)
        assert t.min() < lo + 0.01 and t.max() > hi - 0.01


def test_stages_may_be_trained_on_all_times(key):
    objective = FlowObjective(PPFLOW2, Flow(), 10, stage_times=((0.0, 1.0), (0.25, 1.0)))
    t = np.asarray(
        objective.draw(key, {"x": jnp.zeros((4096, 2, 2, 1)), "label": jnp.zeros(4096, int)}).t
    )
    for times, (low, high) in zip((t[0::2], t[1::2]), objective.stage_times):
        assert low <= times.min() < low + 0.01 and high - 0.01 < times.max() <= high
        assert times.mean() == pytest.approx((low + high) / 2, abs=0.02)


def for_each(apply):
    """`apply` for a tuple of stages."""
    return lambda params, xs, ts, ys, stages: tuple(
        Output(apply(params, *each), {}) for each in zip(xs, ts, ys, stages)
    )


def oracle(flow, x0, x1):
    """A network that knows the answer: the exact prediction for this pair."""

    def apply(params, x, t, y, stage):
        _, velocity = interpolate(flow.interpolant, x0[stage], x1[stage], t)
        if flow.prediction == "velocity":
            return velocity + params["off"]
        sigma = flow.interpolant.sigma(t)[:, None, None, None]
        return (x0[stage] if flow.prediction == "noise" else -x0[stage] / sigma) + params["off"]

    return for_each(apply)


@pytest.mark.parametrize(
    ("path", "prediction", "pyramid"),
    itertools.product(PATHS, PREDICTIONS, (SIT, PPFLOW2, PPFLOW3)),
)
def test_the_exact_prediction_has_no_loss_on_any_path_and_pyramid(path, prediction, pyramid, key):
    flow = Flow(path, prediction)
    x1, labels = jax.random.normal(key, (8, 4, 4, 1)), jnp.zeros(8, jnp.int32)
    weightings = WEIGHTINGS if prediction != "velocity" else ("none",)
    for weighting in weightings:
        objective = FlowObjective(pyramid, flow, 10, weighting)
        draws = objective.draw(key, {"x": x1, "label": labels})
        parts = [
            [strided(a, objective.pattern, s) for s in range(len(pyramid))]
            for a in (draws.noise, x1)
        ]
        right, _ = objective.loss(oracle(flow, *parts), {"off": 0.0}, {}, {"x": x1}, draws, {})
        wrong, _ = objective.loss(oracle(flow, *parts), {"off": 0.1}, {}, {"x": x1}, draws, {})
        assert right < 1e-5 * wrong


@pytest.mark.parametrize("path", PATHS)
def test_score_and_noise_give_the_velocity_back(path, key):
    t = jnp.linspace(0.1, 0.9, 5)
    x0, x1 = jax.random.normal(key, (2, 5, 2, 2, 1))
    x, velocity = interpolate(PATHS[path], x0, x1, t)
    noise = velocity_from(Flow(path, "noise"), x0, x, t)
    np.testing.assert_allclose(noise, velocity, rtol=1e-4, atol=1e-4)
    score = score_from(Flow(path, "velocity"), velocity, x, t)
    back = velocity_from(Flow(path, "score"), score, x, t)
    np.testing.assert_allclose(back, velocity, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_of_the_path(path):
    p, t = PATHS[path], jnp.linspace(0.05, 0.95, 7)
    for f, df in ((p.alpha, p.d_alpha), (p.sigma, p.d_sigma)):
        np.testing.assert_allclose(
            jax.vmap(jax.grad(lambda s, f=f: f(s[None])[0]))(t), df(t), rtol=2e-4
        )
    np.testing.assert_allclose(p.alpha_ratio(t), p.d_alpha(t) / p.alpha(t), rtol=1e-5)


def test_a_stage_weighs_its_duration_whatever_its_share(key):
    def apply(params, x, t, y, stage):
        return x * 0 + stage  # a constant error per stage once x1 = x0 = 0

    x1 = jnp.zeros((16, 4, 4, 1))
    for share in ((), (1, 2, 5)):
        objective = FlowObjective(PPFLOW3, Flow(), 10, stage_share=share)
        draws = Draws(jnp.zeros_like(x1), jnp.full(16, 0.5), jnp.zeros(16, jnp.int32))
        loss, by_stage = objective.loss(for_each(apply), {}, {}, {"x": x1}, draws, {})
        assert float(loss) == pytest.approx(0.25 * 1 + 0.25 * 4)
        assert [float(by_stage[f"loss/stage{i}"]) for i in range(3)] == [0, 1, 4]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FlowObjective(SIT, Flow(), 10, "velocity"), "score and noise"),
        (lambda: FlowObjective(SIT, Flow(), 10, "snr"), "unknown weighting"),
        (lambda: FlowObjective(PPFLOW2, Flow(), 10, stage_share=(1,)), "stage_share"),
        (lambda: FlowObjective(PPFLOW2, Flow(), 10, stage_times=((0.0, 1.0),)), "stage_times"),
        (lambda: FlowObjective(SIT, Flow(), 10, stage_times=((0.5, 0.5),)), "stage_times"),
        (lambda: FlowObjective(SIT, Flow(), 10, label_drop=2.0), "label_drop"),
        (lambda: Flow("cosine"), "unknown path"),
        (lambda: Flow(prediction="x0"), "unknown prediction"),
        (lambda: FlowObjective(PPFLOW3, Flow(), 10).check_batch(10, 1), "multiple of 4"),
        (lambda: FlowObjective(PPFLOW3, Flow(), 10).check_batch(16, 8), "multiple of 32"),
        (lambda: FlowObjective(Pyramid.parse("2x2@0.3,1x1@1"), Flow(), 1).check_batch(8, 1), "3:7"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
