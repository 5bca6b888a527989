"""Steps of every stage under a budget."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ppflow_jax.api.model import Model
from ppflow_jax.checkpoints.card import Card
from ppflow_jax.checkpoints.weights import Weights
from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.pyramid import SIT, Pyramid
from ppflow_jax.tune import allocate
from ppflow_jax.tune.allocate import Budget, shared_out, stage_errors
from ppflow_jax.tune.calibrate import Trajectories, grid_of
from ppflow_jax.tune.fit import Field

MODEL = ModelConfig(SIT, latent_size=8, channels=1, width=8, depth=1, heads=1, num_classes=3)


def test_allocations_fill_the_budget():
    assert Budget(4.0, (1.0, 1.0)).allocations() == [(1, 3), (2, 2), (3, 1)]
    by_cost = Budget(10.0, (1.0, 4.0)).allocations()
    assert by_cost == [(2, 2), (6, 1)]
    cheap = Budget(10.0, (0.1, 4.0)).allocations()  # 59 steps of the first stage are more than 40
    assert cheap == [(20, 2), (40, 1)]
    for budget, words in (
        (Budget(2.0, (1.0,) * 3), "less than one step of each of 3 stage"),
        (Budget(0.5, (0.3, 0.3), "milliseconds"), "0.5 milliseconds"),
        (Budget(500.0, (1.0, 1.0)), "more than 40 steps of every stage"),
    ):
        with pytest.raises(InputError, match=words):
            budget.allocations()


def test_steps_of_a_stage_that_leave_next_to_nothing_are_the_last_that_are_tried(monkeypatch):
    config = replace(MODEL, pyramid=Pyramid.parse("4x4@0.5,2x2@1"))
    model = Model(Weights(Card(config, Flow(), "pixels"), Path("none"), "ema", dict))
    states = np.zeros((3, 2, 8, 8, 1))
    given = Trajectories(np.float32([0, 0.5, 1]), states, np.zeros(2, np.int32))
    tried = []

    def fitted(_, plan, here):
        tried.append((plan.stages[0], steps := len(plan.stages)))
        return plan, here.states[-1] + 0.15**steps

    monkeypatch.setattr(allocate, "closed_form", fitted)
    coarse, fine = stage_errors(Field(model), (1.0, 1.0), (40, 2), given)
    assert tried == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2)]
    np.testing.assert_allclose(coarse, [0.15**2, 0.15**4, 0.15**6, *[0.15**8] * 37])
    np.testing.assert_allclose(fine, [0.15**2, 0.15**4])


@pytest.mark.parametrize(
    ("pyramid", "steps", "expected"),
    [
        ("4x4@0.5,2x2@1", 8, (4, 4)),
        ("4x4@0.7,2x2@1", 10, (7, 3)),  # 0.7 is above its float32 neighbour, 0.3 and 0.6 below
        ("4x4@0.3,4x2@0.6,2x2@1", 10, (3, 3, 4)),
    ],
)
def test_the_usual_steps_are_those_of_the_aligned_grid(pyramid, steps, expected):
    config = replace(MODEL, pyramid=Pyramid.parse(pyramid))
    model = Model(Weights(Card(config, Flow(), "pixels"), Path("none"), "ema", dict))
    budget = Budget(float(steps), (1.0,) * len(config.pyramid))
    assert shared_out(Field(model), budget) == expected
    segments = model.plan(steps=steps, solver="euler").segments
    assert expected == tuple(s.steps for s in segments)
    times = grid_of(model, expected)
    np.testing.assert_array_equal(np.float32(times), np.float32(model.plan(steps=steps).times))
