"""Forecasts that are fitted to a model (docs/tune.md)."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import ppflow_jax as pf
from ppflow_jax.api.model import Model
from ppflow_jax.api.run_samples import RunSamples
from ppflow_jax.errors import InputError, RunError
from ppflow_jax.systems.forecast import Forecast
from ppflow_jax.tune.asked import Asked
from ppflow_jax.tune.calibrate import Setting, Trajectories, calibrated
from ppflow_jax.tune.calibrated_steps import chosen_steps, line_errors
from ppflow_jax.tune.command import tune
from ppflow_jax.tune.features import At, Features
from ppflow_jax.tune.fit import distance
from ppflow_jax.tune.forecasts import State, euler, evenly, fitted
from tests import commands
from tests.systems.checks import random_params

WAYS = {"branch": "dp", "velocity": "teacache"}
ASKED = Asked(cfg=(1.0, 2.0), steps=8, full=4, noises=8)


class Curved(Features):
    """Velocities that are not linear in the weights, as behind the last norm."""

    def __init__(self):
        pass

    def slopes(self, x, y, now, memory, weights):
        sums = memory @ weights
        return sums + 0.05 * sums**2, memory * (1 + 0.1 * sums[..., None])


@pytest.fixture(scope="module")
def model(small_run):
    """Of random numbers, so that all of it shows in a velocity."""
    model = pf.load(small_run)
    return Model(replace(model.weights, load=lambda: random_params(model.config)))


@pytest.fixture(scope="module")
def tuned(model, tmp_path_factory):
    """(plan of every place, what was said), and the last made again."""
    folder, found = tmp_path_factory.mktemp("forecasts"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ppflow_jax.tune.calibrate.FINE", 12)
        patch.setattr("ppflow_jax.tune.features.PART", 4)  # one program for all
        for name in (*WAYS, "again"):
            place = "velocity" if name == "again" else name
            way = dict(out=f"{folder}/{name}.json", forecast=place, schedule=WAYS[place])
            found[name] = folder / f"{name}.json", tune(model, replace(ASKED, **way))
    return found


def test_a_plan_fitted_twice_has_the_same_bytes(tuned):
    assert tuned["velocity"][0].read_bytes() == tuned["again"][0].read_bytes()


@pytest.mark.parametrize("place", WAYS)
def test_the_sampler_leaves_the_error_that_the_file_states(model, tuned, monkeypatch, place):
    file, said = tuned[place]
    values = json.loads(file.read_text())
    errors, forecast = values["made"]["held_out_errors"], values["forecast"]
    assert sum(forecast["full"]) == 4 and forecast["full"][0] and forecast["full"][4]
    for name, value in errors.items():
        line = next(line for line in said.splitlines() if line.startswith(name))
        assert line.split()[-1] == f"{value:.4f}"
    names = [f"{b}, {way}" for way in ("even", WAYS[place]) for b in ("taylor", "hermite")]
    assert list(errors) == ["plan", "euler, 4 steps", "euler, 8 steps", *names]
    assert errors["plan"] < errors["euler, 4 steps"]
    monkeypatch.setattr("ppflow_jax.tune.calibrate.FINE", 12)
    _, held_out = calibrated(model, Setting((1.0, 2.0), 0, 8, 0), file.parent)
    plan = model.plan(file)
    assert not plan.notes and [s.method.place for s in plan.segments] == [place] * 2
    ends = model.trajectory(plan=plan, labels=held_out.labels, noise=held_out.states[0])[-1]
    assert distance(ends, held_out) == pytest.approx(errors["plan"], rel=1e-3)


def test_it_is_explained_evaluated_and_sampled_with_other_guidance(small_run, model, tuned):
    plan = model.plan(tuned["branch"][0])
    lines = plan.explain(batch=2).splitlines()
    assert lines[0].split()[3:5] == ["full", "forecast"]
    assert sum(int(line.split()[4]) for line in lines[1:3]) == 4
    judged = RunSamples(str(small_run), num=4, seed=0, decode="none", plan=str(tuned["branch"][0]))
    assert judged.plan.static == plan.static
    other = model.plan(tuned["branch"][0], cfg=(2, 1))
    assert [s.guided for s in other.segments] == [(True,), (False,)]
    assert [s.full for s in other.segments] == [s.full for s in plan.segments]
    assert "fitted with guidance 1,2" in other.notes[0]


def test_the_flags_arrive(small_run, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "ppflow_jax.tune.command.tune_forecast", lambda m, a: asked.append(a) or "done"
    )
    flags = ("--forecast=blocks", "--steps=8", "--full=4", "--schedule=magcache", "--cfg=1,2")
    code, _, err = commands.run("tune.__main__", f"--checkpoint={small_run}", *flags)
    assert code == 0, err
    way = dict(out="plan.json", forecast="blocks", schedule="magcache", noises=256)
    assert asked == [replace(ASKED, **way)]
    assert asked[0].command == " ".join(["ppflow tune", "--cfg=1,2", *flags[:-1]])


@pytest.mark.parametrize(("schedule", "chosen"), [("magcache", [0, 2, 4]), ("teacache", [0, 3, 4])])
def test_the_published_rules_see_their_signals(model, monkeypatch, schedule, chosen):
    """Two stages of four and three steps; the velocity changes as the square of the input."""
    ratios = np.array([0, 1.0, 0.5, 1.0, 0, 1.0, 1.0])
    inputs = np.array([0, 0.1, 0.2, 0.4, 0, 0.1, 0.2])
    signals = "ppflow_jax.tune.calibrated_steps._signals"
    monkeypatch.setattr(signals, lambda *_: (ratios, inputs, inputs**2))
    plan, features = euler(model, (1.0, 2.0), 7), Curved()
    given = Trajectories(np.zeros(2), np.zeros((2, 1, 8, 8, 1)), np.zeros(1, int))
    full = chosen_steps(schedule, features, plan, 3, given)
    assert np.flatnonzero(full).tolist() == chosen
    monkeypatch.setattr(signals, lambda *_: (ratios * np.nan, inputs, inputs))
    with pytest.raises(RunError, match="train the model"):
        chosen_steps(schedule, features, plan, 3, given)


def changed(**fields):
    return lambda forecast: forecast | fields


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda forecast: [], "not the keys"),
        (lambda forecast: {k: v for k, v in forecast.items() if k != "full"}, "not the keys"),
        (changed(more=1), "not the keys"),
        (changed(place="layers"), "unknown place"),
        (changed(place=["branch"]), "unknown place"),
        (changed(place="blocks"), "none for blocks"),
        (changed(blocks=[0, 1]), "for another place"),
        (changed(place="blocks", blocks=[0, 2]), r"blocks \[0, 2\] of 1"),
        (changed(place="blocks", blocks=[0]), "not enough values"),
        (changed(place="blocks", blocks=3), "int"),
        (changed(depth=0), "depth 0"),
        (changed(depth=True), "depth True"),
        (changed(depth=2), "features of 2 blocks, the model has 1"),
        (changed(slots=99), "99 slots"),
        (changed(slots=2), "8 rows of 2"),
        (changed(full=[True] * 7), "8 times true"),
        (changed(full=[1] * 8), "8 times true"),
        (changed(full=3), "int"),
        (changed(weights=[[0.0] * 3] * 8), "from step 0"),
        (changed(weights=[[1.0, 0.0, float("inf")]] * 8), "finite numbers"),
        (changed(weights=[[1.0, 0.0, 0.0]] * 7 + [[0.0, 0.0, "x"]]), "could not convert"),
    ],
)
def test_damaged_and_foreign_forecasts_are_refused(model, tuned, tmp_path, change, words):
    values = json.loads(tuned["branch"][0].read_text())
    values["forecast"] = change(values["forecast"])
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=words) as found:
        model.plan(file)
    assert "\n" not in str(found.value)


def test_a_range_of_blocks_is_read(model, tuned, tmp_path):
    values = json.loads(tuned["branch"][0].read_text())
    values["forecast"] |= {"place": "blocks", "blocks": [0, 1]}
    (tmp_path / "plan.json").write_text(json.dumps(values))
    plan = model.plan(tmp_path / "plan.json")
    assert [s.method for s in plan.segments] == [Forecast("blocks", 3, (0, 1))] * 2
    plan.tuned.write(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == values


def test_forecasts_of_what_is_not_there_are_refused(model, tuned, tmp_path):
    values = json.loads(tuned["branch"][0].read_text())
    file = tmp_path / "plan.json"
    # A slot that is written later, and a stage that begins with a forecast
    for step, row in ((1, [0.0, 0.0, 1.0]), (4, [1.0, 0.0, 0.0])):
        forecast = json.loads(json.dumps(values["forecast"]))
        forecast["weights"][step], forecast["full"][step] = row, False
        file.write_text(json.dumps(values | {"forecast": forecast}))
        with pytest.raises(InputError, match=f"from step {4 * (step >= 4)} on"):
            model.plan(file)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--forecast=branch"], "needs --steps"),
        (["--forecast=branch", "--steps=8"], "needs --steps"),
        (["--forecast=branch", "--steps=8", "--full=1"], "each of 2 stage"),
        (["--forecast=branch", "--steps=8", "--full=8"], "more steps than that"),
        (["--forecast=branch", "--steps=1000", "--full=8"], "up to 100"),
        (["--forecast=branch", "--evaluations=4"], "--forecast with --evaluations"),
        (["--forecast=branch", "--steps=8", "--full=4", "--norefine"], "with --norefine"),
        (["--forecast=branch", "--steps=8", "--full=4", "--cfg=1,2,3"], "give 1 or 2"),
        (["--evaluations=4", "--steps=8"], "are for forecasts"),
        (["--evaluations=4", "--schedule=teacache"], "are for forecasts"),
    ],
)
def test_bad_flags_are_refused(small_run, tmp_path, args, words):
    flags = (f"--checkpoint={small_run}", f"--out={tmp_path}/plan.json", *args)
    code, _, err = commands.run("tune.__main__", *flags)
    assert code == 1 and words in err and len(err.splitlines()) == 1, err
    assert not list(tmp_path.iterdir())


def test_a_row_is_found_from_where_it_leads():
    draw = np.random.default_rng(0)
    states = [State(draw.normal(size=(5, 2, 2, 1)), np.zeros(5, int)) for _ in range(2)]
    row, length = np.array([2.5, -1.25, 0.0]), np.float32(0.25)
    for state in states:
        state.memory = draw.normal(size=(5, 2, 2, 1, 3))
    goals = [s.x + length * Curved().slopes(s.x, s.y, None, s.memory, row)[0] for s in states]
    prior = np.array([2.0, -1.0, 0.0])
    found = fitted(Curved(), At(0.5, 0, 1.0), length, states, goals, prior, 2)
    np.testing.assert_allclose(found, row, atol=1e-3)


def test_errors_of_lines_are_those_of_the_values():
    values = np.random.default_rng(0).normal(size=(5, 7))
    errors = line_errors(values @ values.T)
    for h, i, m in ((0, 0, 1), (0, 0, 4), (0, 1, 3), (1, 3, 4)):
        ahead = (m - i) / (i - h) if i > h else 0
        missed = values[m] - values[i] - ahead * (values[i] - values[h])
        assert errors[h, i, m] == pytest.approx(np.sum(missed**2))


def test_full_steps_are_spread_evenly(model):
    plan = euler(model, (1.0, 2.0), 20)
    assert np.flatnonzero(evenly(plan, 7)).tolist() == [0, 2, 5, 7, 10, 13, 16]
    assert evenly(plan, 2).sum() == 2 and evenly(plan, 20).all()
    times = replace(plan, stages=(0,) * 18 + (1,) * 2)
    assert evenly(times, 20).all()
