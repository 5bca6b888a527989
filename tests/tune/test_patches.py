"""The patch of every step."""

import itertools
import json

import numpy as np
import pytest

import ppflow_jax as pf
from ppflow_jax.errors import InputError
from ppflow_jax.pyramid import Pyramid
from ppflow_jax.tune import patches
from ppflow_jax.tune.patches import CHANGE, assigned
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
        found = assigned(errors, costs, float(limit))
        assert sum(costs[i, s] for i, s in enumerate(found)) <= limit + 1e-9
        assert total(found) == pytest.approx(total(expected))


@pytest.mark.parametrize("unit", [1e-7, 1.0, 1e12])
def test_costs_are_of_any_unit(unit):
    """As the whole budget is spent to the last digit."""
    errors, costs = np.ones((9, 2)) * [2.0, 1.0], np.tile([1 / 3, 2 / 3], (9, 1)) * unit
    assert assigned(errors, costs, float(costs[:, 0].sum())) == (0,) * 9
    assert assigned(errors, costs, float(costs[:, 1].sum())) == (1,) * 9


def test_a_budget_below_the_coarsest_is_refused():
    with pytest.raises(InputError, match="less than 5 steps with the coarsest"):
        assigned(np.ones((5, 2)), np.ones((5, 2)), 4.0)


def test_a_level_of_hardly_any_use_does_not_appear(monkeypatch):
    errors = np.stack([np.full(6, 1.0), np.full(6, 0.99), np.zeros(6)], axis=1)
    costs = np.tile([1.0, 1.5, 4.0], (6, 1))
    assert assigned(errors, costs, 13.0) == (0, 0, 0, 0, 2, 2)
    monkeypatch.setattr(patches, "CHANGE", 0.0)
    assert assigned(errors, costs, 13.0) == (0, 0, 1, 1, 2, 2)


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
