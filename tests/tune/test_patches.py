"""The patch of every step."""

import itertools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import ppflow_jax as pf
from ppflow_jax.api.model import Model
from ppflow_jax.errors import InputError
from ppflow_jax.pyramid import Pyramid
from ppflow_jax.tune import patches
from ppflow_jax.tune.asked import Asked
from ppflow_jax.tune.fit import Field
from ppflow_jax.tune.patches import CHANGE, assigned, fitted_patches
from tests import commands


def by_trial(errors, costs, limit):
    """The best of all assignments that become finer."""
    price = CHANGE * errors[:, 0].sum()

    def total(stages):
        changes = sum(a != b for a, b in zip(stages, stages[1:]))
        return sum(errors[i, s] for i, s in enumerate(stages)) + price * changes

    every = itertools.combinations_with_replacement(range(errors.shape[1]), len(errors))
    inside = [s for s in every if sum(costs[i, k] for i, k in enumerate(s)) <= limit + 1e-9]
    return min(inside, key=total), total


@pytest.mark.parametrize("seed", range(6))
def test_no_assignment_is_better(seed):
    draw = np.random.default_rng(seed)
    errors = np.sort(draw.uniform(size=(7, 3)), axis=1)[:, ::-1] * draw.uniform(size=(7, 1))
    costs = np.tile([1.0, 2.0, 4.0], (7, 1)) * draw.choice([1, 2], size=(7, 1))
    for limit in (costs[:, 0].sum(), 16.0, 24.0, 60.0):
        if limit < costs[:, 0].sum():
            continue
        expected, total = by_trial(errors, costs, limit)
        first, *others = found = assigned(errors, costs, float(limit))
        assert total(first) == pytest.approx(total(expected))
        assert [*map(total, found)] == pytest.approx(sorted(map(total, found)))
        assert len({*found}) == len(others) + 1
        for stages in found:
            assert sum(costs[i, s] for i, s in enumerate(stages)) <= limit + 1e-9


@pytest.mark.parametrize("unit", [1e-7, 1.0, 1e12])
def test_costs_are_of_any_unit(unit):
    """As the whole budget is spent to the last digit."""
    errors, costs = np.ones((9, 2)) * [2.0, 1.0], np.tile([1 / 3, 2 / 3], (9, 1)) * unit
    assert assigned(errors, costs, float(costs[:, 0].sum()))[0] == (0,) * 9
    assert assigned(errors, costs, float(costs[:, 1].sum()))[0] == (1,) * 9


def test_a_budget_below_the_coarsest_is_refused():
    with pytest.raises(InputError, match="less than 5 steps with the coarsest"):
        assigned(np.ones((5, 2)), np.ones((5, 2)), 4.0)


def test_a_level_of_hardly_any_use_does_not_appear(monkeypatch):
    errors = np.stack([np.full(6, 1.0), np.full(6, 0.99), np.zeros(6)], axis=1)
    costs = np.tile([1.0, 1.5, 4.0], (6, 1))
    assert assigned(errors, costs, 13.0)[0] == (0, 0, 0, 0, 2, 2)
    monkeypatch.setattr(patches, "CHANGE", 0.0)
    assert assigned(errors, costs, 13.0)[0] == (0, 0, 1, 1, 2, 2)


def test_the_command_chooses_patches_or_keeps_the_stages(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr("ppflow_jax.tune.calibrate.FINE", 8)
    file = tmp_path / "plan.json"
    flags = ("--cfg=2", "--choose_patches", "--evaluations=4", "--flops=0.05", "--norefine")
    run = (f"--checkpoint={small_run}", "--noises=8", f"--out={file}")
    code, out, err = commands.run("tune.__main__", *run, *flags)
    assert code == 0 and "were trained" not in out and "overlap" in err, err
    made = json.loads(file.read_text())["made"]
    front = made["front"]
    assert file.with_suffix(".front.png").read_bytes()[:4] == b"\x89PNG"
    costs, errors = zip(*((p["cost"], p["error"]) for p in front["points"]))
    assert list(costs) == sorted(costs) and list(errors) == sorted(errors, reverse=True)
    assert all(Pyramid.parse(p["pyramid"]) and p["pyramid"] in out for p in front["points"])
    assert Pyramid.parse(made["patches"]) and "--choose_patches=true" in made["command"]
    assert pf.load(small_run).plan(file).nfe <= 4


def test_patches_are_compared_with_the_finest_if_it_was_trained(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr("ppflow_jax.tune.calibrate.FINE", 8)
    model, draw = pf.load(small_run), np.random.default_rng(0)
    asked = Asked(str(tmp_path / "plan.json"), (1.0, 2.0), choose_patches=True, noises=8)
    # After a moment of training neither label nor patch would be seen in the output.
    moved = lambda leaf: leaf + np.float32(0.05 * draw.standard_normal(leaf.shape))
    params = jax.tree.map(moved, model.params)
    experiment = dict(model.card.experiment)
    cases = {(): False, ((0, 1), (0.2, 1)): False, ((0, 1), (0, 0.8)): False}
    for times, expected in (cases | {((0, 0.5), (0, 1)): True}).items():
        experiment["flow"] = {**experiment["flow"], "stage_times": times}
        card = replace(model.card, experiment=experiment)
        other = Model(replace(model.weights, card=card, load=lambda: params))
        assert asked.finest(other) == expected
        assert not replace(asked, choose_patches=False).finest(other)
    fit, _ = asked.trajectories(other, (1.0, 2.0), tmp_path / "plan.json")
    field, x = Field(other), fit.states[0]
    for a, b in zip(fit.times, fit.times[1:]):  # Heun's method with the second stage
        scale = 1.0 if b <= 0.5 else 2.0
        k1 = field.at(x, float(a), fit.labels, 1, scale)
        k2 = field.at(x + (b - a) * k1, float(b), fit.labels, 1, scale)
        x = np.float32(x + (b - a) * (k1 + k2) / 2)
    np.testing.assert_allclose(x, fit.states[-1], rtol=1e-5, atol=1e-6)
    own, _ = replace(asked, choose_patches=False).trajectories(other, (1.0, 2.0), asked.target())
    assert np.abs(own.states[-1] - fit.states[-1]).max() > 1e-2
    np.testing.assert_array_equal(own.states[0], fit.states[0])
    times = np.linspace(0, 1, 5)
    chosen, left = fitted_patches(field, (1.0, 2.0), times, [(0,) * 4, (1,) * 4, (0, 0, 1, 1)], fit)
    assert chosen.stages == (1,) * 4 and left < 0.5
