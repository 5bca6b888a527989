import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.errors import InputError
from ppflow_jax.flow.method import Evaluation
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.generate.explain import explain, memory_bytes
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import make_apply
from ppflow_jax.pyramid import PPFLOW2, SIT
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated
from ppflow_jax.systems.forecast import Forecast, ForecastConfig
from tests.acceptance import forecast_parity
from tests.systems.checks import first_full, random_params, within

REFERENCE = Path(__file__).parents[1] / "reference" / "accelerate" / "taylorseer.npz"
MODEL = ModelConfig(PPFLOW2, latent_size=8, channels=2, width=8, depth=3, heads=2, num_classes=4)
LABELS = jnp.arange(8) % 4
NOISE = jax.random.normal(jax.random.key(3), (8, *MODEL.shape))
CFG = (1.0, 2.0)


@pytest.fixture(scope="module")
def ref():
    return dict(np.load(REFERENCE))


def test_schedules_weights_and_forecasts_are_those_of_the_public_code(ref):
    rows = list(forecast_parity.sequences(ref))
    assert len(rows) == 19
    within(rows)


def test_trajectories_and_branches_are_those_of_the_public_code(ref):
    runs = forecast_parity.Runs(ref)
    assert len(runs.names()) == 5
    with jax.default_matmul_precision("highest"):
        within(row for name in runs.names() for row in runs.rows(name))


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


def segments_of(config, model=MODEL, **forecast):
    setting = AccelerateConfig(forecast=ForecastConfig(**forecast))
    return accelerated(config, model, Flow(), setting)


@pytest.fixture(scope="module")
def fast():
    """Heun on 2 levels, the second one guided, forecast in both."""
    config = SamplerConfig("heun", 12, cfg=CFG)
    segments = segments_of(config, interval=(3,), order=1)
    return Sampler(make_apply(MODEL), MODEL, Flow(), config, segments=segments)


def test_rows_of_a_batch_never_mix(fast, params):
    out = fast(params, NOISE, LABELS)
    order = jnp.array([3, 1, 0, 2, 7, 6, 4, 5])
    np.testing.assert_allclose(fast(params, NOISE[order], LABELS[order]), out[order], atol=2e-5)
    changed = fast(params, NOISE.at[1].add(1.0), LABELS.at[1].set(3))
    np.testing.assert_allclose(np.delete(changed, 1, 0), np.delete(out, 1, 0), atol=2e-5)
    assert float(jnp.abs(changed[1] - out[1]).max()) > 1e-2
    assert np.isfinite(out).all()


def test_a_forecast_is_close_to_the_plain_sampler_and_compiles_once_a_stage(fast, params):
    plain = Sampler(make_apply(MODEL), MODEL, Flow(), fast.config)(params, NOISE, LABELS)
    out = fast(params, NOISE + 0, LABELS)
    assert fast.compiled._cache_size() == 2
    error = float(jnp.sqrt(jnp.mean((out - plain) ** 2) / jnp.mean(plain**2)))
    assert 1e-5 < error < 0.05


def test_what_an_earlier_stage_left_behind_has_no_effect(fast, params):
    # With one full step at first, forecasts follow while a slot is still unwritten
    first, segment = segments_of(fast.config, interval=(3,), order=1, warmup=1)
    assert segment.full[0] and not segment.full[1] and not segment.keeps
    weights, slots = segment.inputs["weights"], segment.inputs["slot"]
    written = [set(slots[: i + 1][np.array(segment.full[: i + 1])]) for i in range(segment.steps)]
    assert all(set(np.flatnonzero(w)) <= seen for w, seen in zip(weights, written))
    # The first stage has nothing but full steps, which read none of its poisoned memory
    first = replace(first, full=(True,) * first.steps)

    def run():
        plan = (first, segment)
        sampler = Sampler(fast.apply, MODEL, Flow(), fast.config, segments=plan)
        return sampler(params, NOISE, LABELS)

    def poison(shape):
        rows, columns = MODEL.pyramid.grid(0, MODEL.latent_size)
        of_first = shape.shape[-2] == rows * columns
        return jnp.full(shape.shape, jnp.nan if of_first else -1e30)

    expected = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ppflow_jax.flow.sampler.unwritten", poison)
        out = run()
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(out, expected)


def call_of(params, x, t, stage=1):
    apply = make_apply(MODEL)

    def call(trunk=None):
        return apply(params, x, jnp.full(len(x), t), LABELS[: len(x)], stage, trunk=trunk)

    return call


NOW = {"weights": jnp.ones(1), "slot": jnp.int32(0)}


@pytest.mark.parametrize("method", [Forecast("branch", 1), Forecast("blocks", 1, (1, 3))])
def test_forecast_of_the_same_point_is_the_evaluation(params, method):
    @jax.jit
    def both(x):
        call = call_of(params, x, 0.7)
        full, memory = first_full(method, call, NOW)
        forecast, kept = method.evaluate(Evaluation(call, NOW, False), memory)
        return call(), full, forecast, jax.tree.map(jnp.array_equal, kept, memory)

    plain, full, forecast, same = both(NOISE[:2])
    assert all(jax.tree.leaves(same))
    np.testing.assert_allclose(full, plain, atol=1e-5)
    np.testing.assert_allclose(forecast, plain, atol=1e-5)


def test_gates_embeddings_and_final_layer_are_those_of_the_forecast_step(params):
    method = Forecast("branch", 1)

    def by_hand(memory, blocks, h, c):
        for layer in range(MODEL.depth):
            block = jax.tree.map(partial(lambda p, i: p[i], i=layer), blocks)
            _, _, gate1, _, _, gate2 = block.modulation(c)
            attention, mlp = (ring[layer, 0] for ring in memory)
            h = h + gate1[:, None] * attention + gate2[:, None] * mlp
        return h, None

    @jax.jit
    def all_three(x):
        _, memory = first_full(method, call_of(params, x[:2], 0.7), NOW)
        call = call_of(params, x[2:4], 0.9)
        forecast = method.evaluate(Evaluation(call, NOW, False), memory)[0]
        return forecast, call(partial(by_hand, memory))[0], call()

    forecast, expected, plain = all_three(NOISE)
    np.testing.assert_allclose(forecast, expected, atol=1e-5)
    assert float(jnp.abs(forecast - plain).max()) > 1e-2


def test_what_ranges_of_blocks_add_is_what_all_of_them_add(params):
    @jax.jit
    def added(x):
        methods = (Forecast("blocks", 1, span) for span in ((0, 2), (2, 3), (0, 3)))
        return [first_full(m, call_of(params, x, 0.6), NOW)[1][0] for m in methods]

    first, second, all_of_them = added(NOISE[:2])
    np.testing.assert_allclose(first + second, all_of_them, atol=1e-5)
    assert float(jnp.abs(second).max()) > 1e-2


def linear_field(params, x, t, y, stage):
    return (1.0 + stage + (2.0 - stage) * t)[:, None, None, None] * jnp.ones_like(x)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_velocity_linear_in_time_is_forecast_exactly(solver):
    # were the two evaluations of Heun one history, differences over equal times would enter
    config = SamplerConfig(solver, 16)
    segments = segments_of(config, place="velocity", interval=(4,), order=1)
    assert sum(s.steps - sum(s.full) for s in segments) == 10
    dense = Sampler(linear_field, MODEL, Flow(), config)({}, NOISE, LABELS, trajectory=True)
    run = Sampler(linear_field, MODEL, Flow(), config, segments=segments)
    np.testing.assert_allclose(run({}, NOISE, LABELS, trajectory=True), dense, atol=2e-6)


def test_adams_bashforth_has_the_second_order():
    def field(params, x, t, y, stage):
        return jnp.cos(3 * t)[:, None, None, None] * x

    exact, errors = NOISE * np.exp(np.sin(3.0) / 3), {}
    model = replace(MODEL, pyramid=SIT)
    for order in (0, 1):
        for steps in (20, 40):
            config = SamplerConfig("euler", steps)
            segments = segments_of(
                config, model, forecast="adams", place="velocity", interval=(1,), order=order
            )
            out = Sampler(field, model, Flow(), config, segments=segments)({}, NOISE, LABELS)
            errors[order, steps] = float(jnp.abs(out - exact).max())
    assert 1.7 < errors[0, 20] / errors[0, 40] < 2.3
    assert 3.4 < errors[1, 20] / errors[1, 40] < 4.6


def test_a_change_of_scale_keeps_the_history_and_a_change_of_rows_does_not():
    scales = dict(cfg=(1.0, 2.0, 3.0), cfg_until=(0.625, 0.8125, 1.0))
    segments = segments_of(SamplerConfig("euler", 32, **scales), interval=(4,))
    assert [s.scales for s in segments] == [(1.0,), (1.0,), (2.0,), (3.0,)]
    assert [s.keeps for s in segments] == [False, False, False, True]
    assert [s.full[0] for s in segments] == [True, True, True, False]
    starts = np.flatnonzero([*segments[2].full, *segments[3].full])
    assert starts.tolist() == [0, 1, 5, 9]


def test_history_kept_over_a_change_of_scale_is_used(params):
    """The scale changes where it does not matter: to the same number."""
    config = SamplerConfig("euler", 16, cfg=(2.0,))
    whole = segments_of(config, interval=(4,), order=1)
    cut = whole[1]
    at = 3
    parts = (
        replace(
            cut, times=cut.times[: at + 1], full=cut.full[:at],
            inputs={k: v[:at] for k, v in cut.inputs.items()},
        ),
        replace(
            cut, times=cut.times[at:], full=cut.full[at:], keeps=True,
            inputs={k: v[at:] for k, v in cut.inputs.items()},
        ),
    )  # fmt: skip
    assert not parts[1].full[0]
    run = Sampler(make_apply(MODEL), MODEL, Flow(), config, segments=whole)
    expected = run(params, NOISE, LABELS)
    run.segments = (whole[0], *parts)
    np.testing.assert_allclose(run(params, NOISE, LABELS), expected, atol=1e-6)


def test_the_explained_memory_is_what_the_program_holds(fast, params):
    segment = fast.segments[1]
    rings = 2 * MODEL.depth * 2 * 2 * 16 * 16 * 8 * 4  # slots, branches, Heun, rows, tokens, width
    assert memory_bytes(fast, MODEL, 8) == rings
    held = fast.memory_of(segment, params, None, NOISE, LABELS)
    assert sum(leaf.size * 4 for leaf in jax.tree.leaves(held)) == rings
    plain = Sampler(fast.apply, MODEL, Flow(), fast.config)
    with_rings, without = (
        s.lower(params, NOISE, LABELS, None)[1].compile().memory_analysis().temp_size_in_bytes
        for s in (fast, plain)
    )
    assert rings <= with_rings - without < 1.2 * rings  # in place: there is no copy
    text = explain(fast, MODEL, 8)
    lines = text.splitlines()
    assert lines[0].split() == [
        *("t", "patch", "tokens", "full", "forecast", "guidance", "GFLOPs", "share")
    ]
    assert lines[1].split()[:6] == ["0.000-0.500", "4x4", "4", "6", "6", "none"]
    assert lines[2].split()[:6] == ["0.500-1.000", "2x2", "16", "6", "6", "2"]
    assert "x faster by FLOPs" in text and f"{rings / 2**20:.4g} MiB" in text


@pytest.mark.parametrize(
    ("config", "forecast", "words"),
    [
        (SamplerConfig("dopri5"), {}, "chooses its own steps"),
        (SamplerConfig("sde-euler"), {}, "adds noise"),
        (SamplerConfig("heun"), dict(forecast="adams", place="velocity"), "choose euler"),
        (SamplerConfig(), dict(interval=(1, 2, 3)), "give 1 or 2"),
        (SamplerConfig(), dict(place="blocks", blocks=((1, 9),)), "3 blocks"),
    ],
)
def test_what_does_not_go_together_is_refused(config, forecast, words):
    with pytest.raises(InputError, match=words):
        segments_of(config, **forecast)


def test_cheap_steps_of_velocities_do_not_call_the_network():
    """They did when the compiler moved the call, which reads nothing a cheap step changes."""
    weights = {"w": jnp.full((512, 512), 1e-3)}

    def network(params, x, t, y, stage):
        work = jnp.broadcast_to(x.reshape(len(x), -1)[:, :1], (len(x), 512)).repeat(16, axis=0)
        for _ in range(8):
            work = jnp.tanh(work @ params["w"])
        return x + work[: len(x), :1, None, None]

    def seconds(interval):
        forecast = dict(forecast="adams", place="velocity", order=1, interval=(interval,))
        config = SamplerConfig("euler", 64)
        segments = segments_of(config, **forecast)
        sampler = Sampler(network, MODEL, Flow(), config, segments=segments)
        spent = []
        for _ in range(3):
            start = time.process_time()
            sampler(weights, NOISE, LABELS).block_until_ready()
            spent.append(time.process_time() - start)
        return min(spent[1:])

    assert seconds(interval=8) < 0.5 * seconds(interval=1)
