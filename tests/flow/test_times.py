"""Shifted and logit-normal times: what is drawn, what is stepped through, and that thresholds are
all of the same time."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppflow_jax as pf
from ppflow_jax.checkpoints.card import Card
from ppflow_jax.errors import InputError
from ppflow_jax.flow.grids import aligned_grid
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig, plan
from ppflow_jax.flow.times import Law, LogitNormal, shares, shift_of, shifted, unshifted
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT
from ppflow_jax.systems.registry import times
from ppflow_jax.train.experiment import Experiment
from tests import commands
from tests.systems.checks import within
from tests.systems_parity import SYSTEMS, Reference

REFERENCE = Path(__file__).parents[1] / "reference" / "systems"
ALPHA = 6.928203230275509  # of RAE's latents of 768x16x16


def test_shifts_times_and_grids_are_the_authors():
    rows = list(SYSTEMS["rae"](Reference(REFERENCE / "rae" / "rae.npz")))
    assert len(rows) > 25
    within(rows)


def test_the_shift():
    s = np.linspace(0, 1, 101)
    for alpha in (0.5, 2.0, ALPHA):
        t = shifted(s, alpha)
        assert t[0] == 0 and t[-1] == 1 and np.all(np.diff(t) > 0)
        np.testing.assert_allclose(unshifted(t, alpha), s, atol=1e-12)
        noise = 1 - s
        np.testing.assert_allclose(1 - t, alpha * noise / (1 + (alpha - 1) * noise), atol=1e-12)
    np.testing.assert_array_equal(shifted(s, 1.0), s)
    assert shift_of(4096) == 1 and shift_of(768 * 16 * 16) == pytest.approx(ALPHA)
    assert shifted(0.5, ALPHA) == pytest.approx(0.12613, abs=1e-5)


def objective(pyramid, shift=1.0, normal=None, **options):
    return FlowObjective(pyramid, Flow(shift=shift), 10, logit_normal=normal, **options)


@pytest.mark.parametrize("normal", [None, LogitNormal(), LogitNormal(-0.5, 1.5)])
@pytest.mark.parametrize("shift", [1.0, 4.0])
def test_stages_cut_one_distribution_of_times(shift, normal):
    """What all stages draw together, each weighed as it counts, is what is drawn without stages."""
    whole, cut = objective(SIT, shift, normal), objective(PPFLOW3, shift, normal)
    u = jax.random.uniform(jax.random.key(0), (50_400,))
    one, many = np.asarray(whole.times(u)), np.asarray(cut.times(u))
    stage = np.tile(cut.pattern, len(u) // len(cut.pattern))
    weight = np.asarray(cut.durations)[stage] / np.bincount(stage)[stage]
    assert sum(cut.durations) == pytest.approx(1) and weight.sum() == pytest.approx(1)
    for i, (low, high) in enumerate(PPFLOW3.intervals):
        own = many[stage == i]
        assert np.float32(low) <= own.min() and own.max() <= np.float32(high)
    for t in (0.02, 0.1, 0.3, 0.5, 0.6, 0.75, 0.9):
        assert (one <= t).mean() == pytest.approx(weight[many <= t].sum(), abs=0.01)


def test_thresholds_are_shifted_times():
    """A boundary at t = 0.5 is there in training and sampling, whatever the shift: what changes is
    how many samples and steps are on its sides."""
    flow = Flow(shift=ALPHA)
    raw = unshifted(0.5, ALPHA)
    assert raw == pytest.approx(0.8739, abs=1e-4)
    assert objective(PPFLOW2, ALPHA).durations == pytest.approx((raw, 1 - raw))
    assert objective(PPFLOW2, ALPHA).pattern == (0,) * 7 + (1,)
    coarse, fine = plan(SamplerConfig("euler", 40), PPFLOW2, flow)
    assert coarse.times[-1] == fine.times[0] == 0.5 and fine.times[-1] == 1
    assert (coarse.steps, fine.steps) == (35, 5)
    for segment in (coarse, fine):
        raw = unshifted(np.float64(segment.times), ALPHA)
        np.testing.assert_allclose(np.diff(raw, 2), 0, atol=2e-6)
    # A pyramid whose boundary was meant in raw time is written with the shifted one
    moved = shifted(0.5, ALPHA)
    pyramid = replace(PPFLOW2, stages=(replace(PPFLOW2.stages[0], t_end=moved), PPFLOW2.stages[1]))
    assert [s.steps for s in plan(SamplerConfig("euler", 40), pyramid, flow)] == [20, 20]


@pytest.mark.parametrize("grid", ["aligned", "reference"])
def test_guidance_intervals_are_shifted_times_too(grid):
    config = SamplerConfig("euler", 41, grid, cfg=(2.0,), cfg_interval=(0.1, 0.6))
    for shift in (1.0, ALPHA):
        for segment in plan(config, SIT, Flow(shift=shift)):
            times = np.float32(segment.times)
            decided = (times[:-1] + times[1:]) / 2 if grid == "aligned" else times[:-1]
            inside = (decided > np.float32(0.1)) & (decided <= np.float32(0.6))
            assert np.all(inside == segment.guided[0]) and segment.steps


def test_no_shift_is_the_grid_that_was():
    for steps in (3, 7, 50):
        plain = aligned_grid(0.0, 1.0, steps, PPFLOW3)
        ends = [0.0, 0.5, 0.75, 1.0]
        counts = [int(np.sum((plain >= a) & (plain < b))) for a, b in zip(ends, ends[1:])]
        parts = [np.linspace(a, b, n + 1)[:-1] for a, b, n in zip(ends, ends[1:], counts)]
        np.testing.assert_array_equal(plain, np.float32(np.concatenate([*parts, [1.0]])))
    u = jax.random.uniform(jax.random.key(0), (8,))
    low, high = np.float32([[0, 0.5], [0.5, 1]] * 4).T
    np.testing.assert_array_equal(objective(PPFLOW2).times(u), low + (high - low) * u)


def test_cards_keep_the_shift_and_have_none_without():
    model = ModelConfig(SIT, 8, 4, width=16, depth=1, heads=2, num_classes=5)
    card = Card(model, Flow(shift=2.0), "latents")
    assert Card.from_json(json.loads(json.dumps(card.to_json()))) == card
    plain = Card(model, Flow(), "latents")
    assert plain.to_json()["flow"] == {"path": "linear", "prediction": "velocity"}
    assert "shift" in plain.differences(card)


def test_shares_are_small_and_every_stage_has_one():
    assert shares((0.874, 0.126)) == (7, 1) and shares((0.5, 0.5)) == (1, 1)
    assert shares((0.99, 0.005, 0.005)) == (6, 1, 1)


def test_the_settings():
    config = importlib.import_module("configs.digits").get_config()
    config.flow.shift, config.flow.times = 3.0, "logit_normal:mean=0.5"
    experiment = Experiment.from_config(config)
    assert experiment.objective.law == Law(3.0, LogitNormal(0.5, 1.0))
    assert experiment.card.flow.shift == 3
    config.flow.shift = 0.0
    with pytest.raises(InputError, match="of 4096 numbers or more, these have 64"):
        Experiment.from_config(config)
    config.flow.shift, config.flow.objective = 2.0, "meanflow"
    with pytest.raises(InputError, match="objective meanflow has times of its own"):
        Experiment.from_config(config)
    with pytest.raises(InputError, match="std must be"):
        times("logit_normal:std=0")
    with pytest.raises(InputError, match="number above 0, got -1"):
        Flow(shift=-1.0)
    with pytest.raises(InputError, match="meanflow has no shifted times"):
        plan(SamplerConfig("meanflow", 2), SIT, Flow(shift=2.0))


def test_a_batch_is_trained_on_shifted_times():
    base = objective(PPFLOW2, 3.0, LogitNormal())
    batch = {"x": jnp.zeros((16, 8, 8, 1)), "label": jnp.zeros(16, jnp.int32)}
    t = base.draw(jax.random.key(0), batch).t
    np.testing.assert_array_equal(
        t, base.times(jax.random.uniform(jax.random.split(jax.random.key(0), 3)[1], (16,)))
    )


@pytest.mark.long
def test_a_run_saves_its_shift_and_samples_with_it(tmp_path):
    """The command of docs/rae.md."""
    flags = ["--config.flow.shift=2", "--config.flow.times=logit_normal:mean=0,std=1"]
    size = ["--config.data.batch_size=64", "--config.train.steps=2"]
    code, _, err = commands.train(tmp_path / "run", *flags, *size)
    assert code == 0, err
    model = pf.load(tmp_path / "run")
    assert model.card.flow.shift == 2
    plan = model.plan(steps=12)
    assert model.sample(2, plan=plan).latents.shape == (2, 8, 8, 1)
    coarse, fine = plan.segments
    assert (coarse.steps, fine.steps) == (8, 4) and coarse.times[-1] == 0.5
