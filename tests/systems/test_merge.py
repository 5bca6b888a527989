from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.errors import InputError
from ppflow_jax.flow.cost import sampling_flops
from ppflow_jax.flow.method import Evaluation
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig, plan
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.generate.explain import explain
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.network import make_apply
from ppflow_jax.pyramid import PPFLOW3, SIT
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated
from ppflow_jax.systems.merged_blocks import Merged, Merging, full_layer, parts
from ppflow_jax.systems.sdtm import MergeConfig, on_plateaus, schedule
from tests.acceptance import merge_parity
from tests.systems.checks import first_full, random_params, within

REFERENCE = Path(__file__).parents[1] / "reference" / "accelerate" / "sdtm.npz"
MODEL = ModelConfig(PPFLOW3, latent_size=8, channels=2, width=8, depth=2, heads=2, num_classes=4)
NOISE = jax.random.normal(jax.random.key(3), (8, *MODEL.shape))
LABELS = jnp.arange(8) % 4


@pytest.fixture(scope="module")
def ref():
    return dict(np.load(REFERENCE))


def test_schedules_are_those_of_the_public_code(ref):
    rows = list(merge_parity.schedules(ref))
    assert len(rows) == 21
    within(rows)


def test_the_order_of_the_ratio_arithmetic_counts():
    """0.35 - 0.1 is just below 1/4: 63 of 256 tokens, not 64, before rounding to 48."""
    config = MergeConfig(ratio=0.35, deviation=0.1)
    assert schedule(config, 20, (16, 16))[-1].count == 48


def test_counts_never_exceed_the_windows():
    """The original raises here."""
    config = MergeConfig(ratio=0.9, deviation=0.05, switch=0.5)
    for grid, quarter in (((32, 32), 256), ((8, 8), 16), ((16, 8), 32)):
        first, *_, last = schedule(config, 20, grid)
        assert (first.kind, first.count) == ("windows", quarter)
        assert (last.kind, last.count) == ("tokens", 3 * quarter)
        assert first.tokens() == (quarter, quarter) and last.tokens() == (4 * quarter, quarter)


def test_trajectories_are_those_of_the_public_code(ref):
    with jax.default_matmul_precision("highest"):
        within(merge_parity.Network(ref).rows("cfg", decisions=False))


def test_counts_change_least_until_they_lie_on_so_many_plateaus():
    def ways(*runs):
        return [Merging(kind, count, (8, 8)) for kind, count, n in runs for _ in range(n)]

    falling = ways(("windows", 8, 2), ("windows", 7, 1), ("tokens", 20, 2), ("tokens", 18, 4))
    assert on_plateaus(falling, 4) == falling
    # A window more in 1 step is 3 tokens, 2 tokens less in 2 steps are 4.
    assert on_plateaus(falling, 3) == ways(("windows", 8, 3), ("tokens", 20, 2), ("tokens", 18, 4))
    assert on_plateaus(falling, 2) == ways(("windows", 8, 3), ("tokens", 18, 6))
    assert on_plateaus(falling, 1) == on_plateaus(falling, 2)


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


def segments_of(config, model=MODEL, **merge):
    setting = AccelerateConfig(merge=MergeConfig(**merge))
    return accelerated(config, model, Flow(), setting)


CONFIG = SamplerConfig("euler", 16, cfg=(1.0, 1.0, 2.0))


@pytest.fixture(scope="module")
def sdtm():
    """3 levels, merged in the guided finest one and in the middle one, of 4x2 tokens."""
    merge = dict(ratio=0.4, deviation=0.0, switch=0.3, round_to=1, merge_stages=(1, 2))
    return Sampler(make_apply(MODEL), MODEL, Flow(), CONFIG, segments=segments_of(CONFIG, **merge))


def test_the_plan_cuts_where_the_count_changes(sdtm):
    def ways(segment):
        return {segment.method.ways[i] for i in segment.inputs["way"]}

    shown = [
        (s.stages[0], s.method and [(w.kind, w.count) for w in ways(s)], s.full, s.keeps)
        for s in sdtm.segments
    ]
    assert shown == [
        (0, None, (), False),
        (1, [("windows", 1)], (True, False), False),
        (1, [("tokens", 3)], (False, True), True),
        (2, [("windows", 2)], (True, False), False),
        (2, [("tokens", 6)], (False, True), True),
    ]
    times = [t for s in sdtm.segments for t in s.times[1:]]
    assert times == [t for s in plan(CONFIG, MODEL.pyramid, Flow()) for t in s.times[1:]]


def test_images_are_finite_and_rows_never_mix(sdtm, params):
    out = sdtm(params, NOISE, LABELS)
    assert np.isfinite(out).all()  # memory starts as NaN
    programs = sdtm.compiled._cache_size()
    changed = sdtm(params, NOISE.at[1].add(1.0), LABELS.at[1].set(3))
    assert sdtm.compiled._cache_size() == programs
    same = np.arange(8) != 1
    np.testing.assert_array_equal(changed[same], out[same])
    assert (np.asarray(changed[1]) != np.asarray(out[1])).any()
    assert "merged" in (text := explain(sdtm, MODEL, 8)) and "faster by FLOPs" in text


def test_the_label_never_reaches_the_row_of_the_null_class(params):
    """Counters and stored branches of the odd rows, under another label."""
    method, inputs = Merged((Merging("tokens", 4, (4, 4)),)), {"way": 0}
    rows = jnp.repeat(NOISE[:2], 2, axis=0)

    @jax.jit
    def memory_after(labels):
        labels = jnp.stack([labels, jnp.full(2, MODEL.null_label)], axis=1).reshape(-1)

        def call(trunk=None):
            return make_apply(MODEL)(params, rows, jnp.full(4, 0.8), labels, 2, trunk=trunk)

        _, memory = first_full(method, call, inputs)
        out, memory = method.evaluate(Evaluation(call, inputs, False), memory)
        return out, memory["counter"], *(jnp.swapaxes(b, 0, 1) for b in memory["stored"])

    for a, b in zip(memory_after(jnp.array([0, 1])), memory_after(jnp.array([2, 3]))):
        np.testing.assert_array_equal(a[1::2], b[1::2])
    assert np.any(a[0::2] != b[0::2])


@pytest.mark.parametrize("merge", [dict(merge="tome"), dict(protect=0)])
def test_without_full_steps(merge):
    model, config = replace(MODEL, pyramid=SIT), SamplerConfig("euler", 4)
    params = random_params(model)
    sampler = Sampler(make_apply(model), model, Flow(), config)
    plain = sampler(params, NOISE, LABELS)
    sampler.segments = segments_of(
        config, model, ratio=0.4, deviation=0.0, switch=1.0, round_to=1, **merge
    )
    assert not any(any(s.full) for s in sampler.segments)
    out = sampler(params, NOISE, LABELS)
    assert np.isfinite(out).all() and np.abs(out - plain).max() > 1e-4


def test_tokens_constant_in_a_window(params):
    """Only with proportional attention do half the windows merged leave the block as it is."""
    rng = np.random.default_rng(0)
    pooled = rng.normal(size=(1, 2, 2, MODEL.width))
    h = jnp.float32(pooled.repeat(2, axis=1).repeat(2, axis=2).reshape(1, 16, MODEL.width))
    counter = jnp.zeros((1, 16), jnp.int32)

    def outputs(blocks, _, c):
        layer = parts(jax.tree.map(lambda p: p[0], blocks), c)
        full = full_layer(layer, h)[0]

        def merged(kind, count, proportional):
            method = Merging(kind, count, (4, 4), proportional=proportional)
            return method.layer(layer, h, counter, None)[0]

        settings = [("tokens", 8, False), ("windows", 4, False), ("windows", 2, True)]
        return h, (full, *(merged(*s) for s in settings), merged("windows", 2, False))

    run = jax.jit(lambda: make_apply(MODEL)(params, NOISE[:1], jnp.ones(1), LABELS[:1], 2, outputs))
    full, *same, different = run()[1]
    for out in same:
        np.testing.assert_allclose(out, full, atol=2e-5)
    assert np.abs(different - full).max() > 1e-3


@pytest.mark.parametrize(
    ("merge", "words"),
    [
        ({"merge": "average"}, "one of sdtm, tome"),
        ({"ratio": 0.9}, "less than 1 together"),
        ({"ratio": -0.1}, "at least 0"),
        ({"switch": 1.5}, r"merge switch 1.5 must be in \[0, 1\]"),
        ({"mixing": -1.0}, "merge mixing"),
        ({"frequency": float("nan")}, "finite"),
        ({"round_to": 0}, "round_to"),
        ({"plateaus": 0}, "plateaus"),
        ({"merge_stages": (3,)}, "the model has 3 stage"),
        ({"merge_stages": (0,), "latent": 12}, "do not tile a grid of 3x3"),
    ],
)
def test_bad_settings_are_refused(merge, words):
    model = replace(MODEL, latent_size=merge.pop("latent", 8))
    with pytest.raises(InputError, match=words):
        segments_of(CONFIG, model, **merge)


def test_composition():
    def segments(text, config=CONFIG, pyramid=PPFLOW3):
        config = replace(config, cfg=config.cfg[-len(pyramid) :])
        model = replace(MODEL, pyramid=pyramid)
        return accelerated(config, model, Flow(), AccelerateConfig.parse(text))

    for pyramid, advice in ((PPFLOW3, "forecast.interval=4/4/1"), (SIT, "choose one")):
        words = f"stage {len(pyramid) - 1} cannot have both forecast and merged steps: .*{advice}"
        with pytest.raises(InputError, match=words):
            segments("forecast.interval=3,merge=sdtm", pyramid=pyramid)
    both = segments("forecast.interval=3/3/1,merge=sdtm,merge.round_to=1,merge.stages=2")
    names = [s.method.name for s in both]
    assert names[:2] == ["forecast"] * 2 and set(names[2:]) == {"merged"}
    for solver in ("dopri5", "sde-heun"):
        with pytest.raises(InputError, match="choose euler or heun with merge"):
            segments("merge=sdtm", SamplerConfig(solver, 16))
    # guidance cuts the stage: other batch rows, so a full step first
    cut = [s for s in segments("guidance=0.9-1,merge=sdtm,merge.round_to=1") if s.method]
    first = [s for s in cut if not s.keeps]
    assert [s.guided[0] for s in first] == [False, True] and all(s.full[0] for s in first)


def test_cost():
    """SiT-XL with the settings of the public script: 1.20 times fewer FLOPs by the sheet."""
    model = ModelConfig(SIT, 32, 4, **SIZES["XL"], num_classes=1000)
    config = SamplerConfig("euler", 50)
    plain = sampling_flops(model, plan(config, SIT, Flow()))
    saved = {
        most: plain / sampling_flops(model, segments_of(config, model, plateaus=most))
        for most in (MergeConfig.plateaus, 64)
    }
    assert saved[64] == pytest.approx(1.20, abs=0.01)
    assert saved[MergeConfig.plateaus] == pytest.approx(saved[64], rel=0.002)
    # the middle stage's grid is not square
    model = ModelConfig(PPFLOW3, 32, 4, **SIZES["XL"], num_classes=1000)
    segments = segments_of(config, model, merge_stages=(1,))
    assert {w.grid for s in segments if s.method for w in s.method.ways} == {(16, 8)}
    assert sampling_flops(model, segments) < sampling_flops(model, plan(config, PPFLOW3, Flow()))
