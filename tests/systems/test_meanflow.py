"""Average velocities: the identity and the two jumps on a flow that is known exactly, kinds of
intervals and their rows, guidance inside the target."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.devices.programs import Programs
from ppflow_jax.errors import InputError
from ppflow_jax.flow.cost import training_flops
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow, expand
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.models.conditions import Scalar
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.network import Output, make_apply
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT
from ppflow_jax.systems.meanflow import MeanFlow
from ppflow_jax.systems.meanflow_targets import (
    Rows,
    averages,
    by_turns,
    identity_targets,
    in_turns,
)
from ppflow_jax.systems.meanflow_times import ACROSS, POINT, WITHIN, Times, kinds_of, pairs
from tests.systems.checks import random_params

UNIFORM = Times("uniform")
PYRAMIDS = {"sit": SIT, "levels 2": PPFLOW2, "levels 3": PPFLOW3}
MODEL = ModelConfig(
    SIT,
    8,
    1,
    width=16,
    depth=2,
    heads=2,
    num_classes=5,
    conditions=(Scalar("interval", scale=1.0),),
)
SPREAD = 0.4  # standard deviation of data around 0, whose flow is known


def made(pyramid, **settings):
    model = replace(MODEL, pyramid=pyramid)
    return MeanFlow(**settings).on(FlowObjective(pyramid, Flow(), 5), model)


def deviation(t):
    """Standard deviation of z_t."""
    return jnp.sqrt((SPREAD * t) ** 2 + (1 - t) ** 2)


def velocity(z, t):
    slope = (SPREAD**2 * t - (1 - t)) / deviation(t) ** 2
    return expand(slope) * z


def exact(params, zs, ts, ys, stages):
    """The network that has learned the averages of this flow: z_r = z_t deviation(r) / dev(t)."""

    def average(z, t, r):
        length = jnp.where(r > t, r - t, 1)
        ratio = deviation(r) / deviation(t) - 1
        return jnp.where((r > t)[:, None, None, None], expand(ratio / length) * z, velocity(z, t))

    return tuple(
        Output(params["factor"] * average(z, t, t + y["interval"]), {})
        for z, t, y in zip(zs, ts, ys)
    )


def batch_of(objective, patterns=6, size=2):
    rows = patterns * len(objective.pattern)
    key = jax.random.key(0)
    batch = {"x": jnp.zeros((rows, size, size, 1)), "label": jnp.arange(rows) % 5}
    draws = objective.draw(key, batch)
    z = jax.random.normal(jax.random.key(1), (rows, size, size, 1))
    return Rows(z, velocity(z, draws.t), draws.t, draws.r, draws.labels)


@pytest.mark.parametrize("pyramid", PYRAMIDS.values(), ids=PYRAMIDS)
def test_the_averages_of_a_known_flow_are_their_own_targets(pyramid):
    objective = made(pyramid, points=0.5, times="uniform")
    rows = objective.by_kind(batch_of(objective))
    targets = jax.jit(lambda factor: objective.targets(exact, {"factor": factor}, rows))
    known = jax.jit(lambda: averages(exact, {"factor": 1.0}, rows))()
    assert {kind.name for kind in known} == {POINT, WITHIN} | (
        {ACROSS} if len(pyramid) > 1 else set()
    )
    for kind, target in targets(1.0).items():
        np.testing.assert_allclose(target, known[kind], atol=2e-5, err_msg=kind)
    # and they are fixed by it: averages that are too long are pulled back
    for kind, target in targets(1.1).items():
        if kind.name != POINT and kind.stage == len(pyramid) - 1:
            assert np.abs(target - 1.1 * known[kind]).max() > 1e-3


def test_the_derivative_is_along_the_way_with_the_end_held():
    """Against differences of a network that depends on all of its inputs."""

    def network(params, zs, ts, ys, stages):
        return tuple(
            Output(jnp.sin(z * expand(1 + t)) + expand(jnp.cos(3 * t + 2 * y["interval"])) * z, {})
            for z, t, y in zip(zs, ts, ys)
        )

    objective = made(SIT, points=0.5)
    rows = objective.by_kind(batch_of(objective))
    rows = {kind: own for kind, own in rows.items() if kind.name == WITHIN}
    ((kind, own),) = rows.items()
    step = 1e-2

    def at(s):
        moved = own._replace(z=own.z + s * own.v, t=own.t + s)
        return averages(network, {}, {kind: moved})[kind]

    change = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
    target = own.v + expand(own.r - own.t) * change
    np.testing.assert_allclose(identity_targets(network, {}, rows)[kind], target, atol=1e-3)


@pytest.mark.parametrize("times", [UNIFORM, Times()], ids=["uniform", "logit-normal"])
@pytest.mark.parametrize("pyramid", PYRAMIDS.values(), ids=PYRAMIDS)
def test_intervals_are_sorted_pairs_of_independent_times(pyramid, times):
    kinds = kinds_of(pyramid, times, 0.25)
    assert sum(kind.weight for kind in kinds) == pytest.approx(1)
    size = sum(kind.rows for kind in kinds)
    rng = np.random.default_rng(0)
    u = rng.random((2, 4096 * size))
    t, r = (np.asarray(a) for a in pairs(pyramid, times, kinds, jnp.float32(u)))
    a, b = np.sort([times.at(jnp.float32(rng.random(20000))) for _ in range(2)], axis=0)
    start, mean = 0, np.zeros(3)
    for kind in kinds:
        where = (np.arange(len(t)) % size >= start) & (np.arange(len(t)) % size < start + kind.rows)
        start += kind.rows
        low, high = pyramid.intervals[kind.stage]
        assert (t[where] >= low).all() and (t[where] <= high).all()
        if kind.name == POINT:
            assert (r[where] == t[where]).all()
            continue
        later = r[where] >= high if kind.name == ACROSS else r[where] <= high
        assert later.all() and (r[where] >= t[where]).all()
        moments = np.stack([t[where], r[where], r[where] - t[where]]).mean(axis=1)
        mean += kind.weight / 0.75 * moments
    np.testing.assert_allclose(mean, np.stack([a, b, b - a]).mean(axis=1), atol=0.01)


def test_rows_of_a_batch_follow_the_weights():
    rows = {(k.stage, k.name): k.rows for k in kinds_of(PPFLOW2, UNIFORM, 0.5)}
    assert rows == {
        (0, POINT): 2, (0, WITHIN): 1, (0, ACROSS): 2, (1, POINT): 2, (1, WITHIN): 1,
    }  # fmt: skip
    assert [k.rows for k in kinds_of(SIT, Times(), 0.75)] == [3, 1]
    for pyramid in PYRAMIDS.values():
        kinds = kinds_of(pyramid, Times(), 0.5)
        assert sum(k.rows for k in kinds) <= 16 and min(k.rows for k in kinds) == 1


def test_rows_in_turns_come_apart_again():
    parts = [jnp.arange(6), 10 + jnp.arange(3), 20 + jnp.arange(9)]
    joined = in_turns(tuple(parts))
    assert joined[:6].tolist() == [0, 1, 10, 20, 21, 22]
    back = by_turns(joined, [6, 3, 9])
    jax.tree.map(np.testing.assert_array_equal, back, parts)


def test_guidance_is_inside_the_velocity():
    objective = made(SIT, points=0.5, omega=2.0, kappa=0.25)
    rows = objective.by_kind(batch_of(objective, 40))
    of_label = jnp.arange(6.0)

    def network(params, zs, ts, ys, stages):
        return tuple(
            Output(z * 0 + expand(of_label[y["label"]] + y["interval"]), {}) for z, y in zip(zs, ys)
        )

    guided = objective.guided(network, {}, rows)
    dropped = 0
    for kind, own in rows.items():
        wanted = 2 * own.v + 0.25 * expand(of_label[own.y]) + (1 - 2 - 0.25) * 5.0
        null = np.asarray(own.y == 5)
        dropped += null.sum()
        np.testing.assert_allclose(guided[kind].v[~null], wanted[~null], rtol=1e-5)
        np.testing.assert_array_equal(guided[kind].v[null], own.v[null])
    assert dropped
    plain = made(SIT, points=0.5)
    assert plain.guided(network, {}, rows) is rows  # no evaluation


def test_the_loss_is_weighted_by_the_error_of_each_sample():
    objective = made(PPFLOW2, points=0.5, times="uniform", power=0.75)
    x1 = SPREAD * jax.random.normal(jax.random.key(2), (32, 2, 2, 1))
    draws = objective.draw(jax.random.key(3), {"x": x1, "label": jnp.zeros(32, int)})
    loss = lambda p: objective.loss(exact, {"factor": p}, {}, {"x": x1}, draws, {})
    (total, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(1.2)
    rows = objective.by_kind(Rows(*_states(draws, x1)))
    fixed = jax.jit(lambda: objective.targets(exact, {"factor": 1.2}, rows))()

    def squares(p):
        errors = {k: u - fixed[k] for k, u in averages(exact, {"factor": p}, rows).items()}
        return {k: jnp.sum(jnp.square(e), axis=(1, 2, 3)) for k, e in errors.items()}

    known = jax.jit(squares)(1.2)
    weights = {k: (e + 1e-3) ** -0.75 for k, e in known.items()}
    mean = lambda found: sum(k.weight * np.mean(np.asarray(e)) for k, e in found.items())
    assert metrics["mse"] == pytest.approx(mean(known) / 4, rel=1e-5)  # of 4 elements
    assert total == pytest.approx(mean({k: weights[k] * e for k, e in known.items()}), rel=1e-5)
    # The gradient is that of the prediction alone
    by_hand = lambda p: sum(k.weight * jnp.mean(weights[k] * e) for k, e in squares(p).items())
    assert gradient == pytest.approx(float(jax.jit(jax.grad(by_hand))(1.2)), rel=1e-4)


def _states(draws, x1):
    t = expand(draws.t)
    return t * x1 + (1 - t) * draws.noise, x1 - draws.noise, draws.t, draws.r, draws.labels


PROGRAMS = {
    "scanned": dict(programs=Programs("xla"), remat="full"),
    "unrolled": dict(programs=Programs("deferred", rows=True, unrolled=True)),
}


@pytest.mark.parametrize("options", PROGRAMS.values(), ids=PROGRAMS)
def test_the_derivative_goes_through_the_network(options):
    """Of the whole network, by forward mode, against differences in float32."""
    model = replace(MODEL, pyramid=PPFLOW2, latent_size=8)
    apply, params = make_apply(model, **options), random_params(model)
    params = jax.tree.map(lambda leaf: 0.5 * leaf, params)
    objective = made(PPFLOW2, points=0.5, times="uniform")
    rows = objective.by_kind(batch_of(objective, 1, 8))
    rows = {kind: own for kind, own in rows.items() if kind.name == WITHIN}
    with jax.default_matmul_precision("highest"):
        targets = jax.jit(lambda: identity_targets(apply, params, rows))()

        @jax.jit
        def at(s):
            moved = {k: r._replace(z=r.z + s * r.v, t=r.t + s) for k, r in rows.items()}
            return averages(apply, params, moved)

        step = 3e-3
        near, far = ([at(k * step), at(-k * step)] for k in (1, 2))
    for kind, own in rows.items():
        a, b = (pair[0][kind] - pair[1][kind] for pair in (near, far))
        change = (8 * a - b) / (12 * step)
        target = own.v + expand(own.r - own.t) * change
        assert np.abs(targets[kind] - own.v).max() > 0.01
        np.testing.assert_allclose(targets[kind], target, atol=2e-3)


def test_a_step_costs_what_it_evaluates():
    plain, guided = (made(PPFLOW2, points=0.5, times="uniform", **s) for s in ({}, {"kappa": 0.5}))
    assert guided.pattern == plain.pattern == (0, 0, 0, 0, 0, 1, 1, 1)
    # two passes for a derivative, two jumps for each row across
    assert sorted(plain.evaluated) == [0, 0, 0, 0, 1, 1, 1, 1]
    # and two velocities of every row but those across
    assert sorted(guided.evaluated) == sorted([*plain.evaluated, *[0, 0, 0, 1, 1, 1] * 2])
    model = replace(MODEL, pyramid=PPFLOW2)
    coarse, fine = (forward_flops(model, stage) for stage in (0, 1))
    flops = training_flops(model, plain.pattern, 8, plain.evaluated)
    assert flops == (15 + 4) * coarse + (9 + 4) * fine


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (dict(points=1.5), "points must be in"),
        (dict(omega=0.0), "omega must be above 0"),
        (dict(kappa=1.0), "kappa at least 0 and below 1"),
        (dict(constant=0.0), "constant above 0"),
        (dict(times="normal"), "give uniform or logit-normal"),
    ],
)
def test_values_out_of_range_are_refused(setting, words):
    with pytest.raises(InputError, match=words):
        MeanFlow(**setting)


def test_what_does_not_fit_is_refused():
    base = FlowObjective(SIT, Flow(), 5)
    for changes, words in (
        (dict(flow=Flow("gvp")), "path linear and prediction velocity"),
        (dict(stage_share=(1,)), "stage_share, terms and config.data.task out"),
    ):
        with pytest.raises(InputError, match=words):
            MeanFlow().on(replace(base, **changes), MODEL)
    with pytest.raises(InputError, match="scalar:name=interval,scale=1"):
        MeanFlow().on(base, replace(MODEL, conditions=()))
    with pytest.raises(InputError, match="16 rows of objective meanflow"):
        made(PPFLOW3).check_batch(100, 8)
    guided = SamplerConfig(cfg=(3.0,))
    with pytest.raises(InputError, match="a guidance of 2 inside: leave cfg out, not 3"):
        MeanFlow(kappa=0.5).notes(guided)
    assert MeanFlow().notes(guided) == ()
