"""Learned caching that is fitted to a model (docs/harmonica.md)."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import ppflow_jax as pf
from ppflow_jax.api.model import Model
from ppflow_jax.api.run_samples import RunSamples
from ppflow_jax.errors import InputError, RunError
from ppflow_jax.flow.cost import sampling_flops
from ppflow_jax.systems.routed import Routed
from ppflow_jax.tune import routers
from ppflow_jax.tune.asked import Asked
from ppflow_jax.tune.calibrate import Setting, Trajectories, calibrated
from ppflow_jax.tune.calibrated_steps import groups
from ppflow_jax.tune.command import tune
from ppflow_jax.tune.fit import distance
from ppflow_jax.tune.forecasts import euler
from ppflow_jax.tune.masks import LEAST, Costs, price_of, static_masks
from ppflow_jax.tune.mixtures import Mixtures
from tests import commands
from tests.systems.checks import random_params

ASKED = Asked(cfg=(1.0, 2.0), steps=8, share=0.6, noises=8, forecast="harmonica")
SHORT = {
    "ppflow_jax.tune.calibrate.FINE": 12,
    "ppflow_jax.tune.routers.EPOCHS": 4,
    "ppflow_jax.tune.routers.BATCH": 4,  # as many as are held out: one program for both
    "ppflow_jax.tune.routers.RENEWED": 16,  # every second rollout
}


@pytest.fixture(scope="module")
def model(small_run):
    """Of random numbers, so that all of it shows in a velocity."""
    model = pf.load(small_run)
    return Model(replace(model.weights, load=lambda: random_params(model.config)))


@pytest.fixture(scope="module")
def short():
    """Short training, and the same programs for all models, which differ in their numbers alone."""
    made = []

    def shared(model, channels, plan, rate):
        made[:] = made or [Mixtures(model, channels, plan, rate)]
        mixtures = made[0].on(plan)
        mixtures.model = model
        return mixtures

    with pytest.MonkeyPatch.context() as patch:
        for name, value in SHORT.items():
            patch.setattr(name, value)
        patch.setattr(routers, "Mixtures", shared)
        yield patch


@pytest.fixture(scope="module")
def tuned(model, short, tmp_path_factory):
    """(plan, what was said)."""
    file = tmp_path_factory.mktemp("routers") / "plan.json"
    return file, tune(model, replace(ASKED, out=str(file)))


@pytest.mark.long
def test_a_killed_call_continues_and_makes_the_same_bytes(model, short, tuned, tmp_path):
    killed, calls, whole = tmp_path / "killed.json", [], routers._rollout
    asked = replace(ASKED, out=str(killed), calibration=str(tuned[0].parent))
    [kept] = tuned[0].parent.glob("router-*.npz")
    finished = kept.read_bytes()
    kept.unlink()

    def dies(*given):
        calls.append(given)
        if len(calls) == 5:  # with the measurement, the fourth of all rollouts
            raise KeyboardInterrupt
        return whole(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routers, "_rollout", dies)
        with pytest.raises(KeyboardInterrupt):
            tune(model, asked)
        assert kept.exists() and not killed.exists()
        patch.setattr(routers, "_rollout", lambda *given: (calls.append(given), whole(*given))[1])
        del calls[:]
        tune(model, asked)
    assert len(calls) == 3  # two rollouts and a measurement were left
    assert kept.read_bytes() == finished
    assert killed.read_bytes() == tuned[0].read_bytes()
    kept.write_bytes(finished[:100])
    with pytest.raises(InputError, match="is damaged"):
        tune(model, asked)
    kept.write_bytes(finished)


def test_the_sampler_leaves_the_error_that_the_file_states(model, short, tuned):
    file, said = tuned
    values = json.loads(file.read_text())
    errors = values["made"]["held_out_errors"]
    names = ["plan", "euler, 5 steps", "euler, 8 steps", "5 full steps, reused"]
    assert list(errors) == names
    for name, value in errors.items():
        line = next(line for line in said.splitlines() if line.startswith(name))
        assert line.split()[-1] == f"{value:.4f}"
    spent = [float(line.split()[-2].rstrip("%")) for line in said.splitlines()[1:5]]
    assert max(spent[0], spent[1], spent[3]) <= 60 and spent[2] == 100
    assert spent[0] == pytest.approx(100 * values["made"]["computed"], abs=0.06)
    _, held_out = calibrated(model, Setting((1.0, 2.0), 0, 8, 0), file.parent)
    plan = model.plan(file)
    assert not plan.notes and all(isinstance(s.method, Routed) for s in plan.segments)
    assert [len(s.method.patterns) for s in plan.segments] == values["made"]["patterns"]
    ends = model.trajectory(plan=plan, labels=held_out.labels, noise=held_out.states[0])[-1]
    assert distance(ends, held_out) == pytest.approx(errors["plan"], rel=1e-3)
    whole = model.plan(steps=8, solver="euler", cfg=(1.0, 2.0))
    assert sampling_flops(model.config, plan.segments) < sampling_flops(
        model.config, whole.segments
    )


def test_it_is_explained_evaluated_and_sampled_with_other_guidance(small_run, model, tuned):
    plan = model.plan(tuned[0])
    assert plan.explain(batch=2).splitlines()[0].split()[3:5] == ["full", "routed"]
    judged = RunSamples(str(small_run), num=4, seed=0, decode="none", plan=str(tuned[0]))
    assert judged.plan.static == plan.static
    other = model.plan(tuned[0], cfg=(2, 1))
    assert [s.guided for s in other.segments] == [(True,), (False,)]
    assert [s.method for s in other.segments] == [s.method for s in plan.segments]
    assert "fitted with guidance 1,2" in other.notes[0]
    plan.tuned.write(tuned[0].parent / "again.json")
    assert (tuned[0].parent / "again.json").read_bytes() == tuned[0].read_bytes()


def test_what_adds_nothing_is_not_computed(model, short, tmp_path, monkeypatch):
    """The MLPs' gates are closed: their scores fall, and attention gets the budget."""
    monkeypatch.setattr(routers, "EPOCHS", 60)
    params = model.params
    open_ = np.ones(6)
    open_[5] = 0
    adaln = {
        name: np.asarray(leaf) * np.repeat(open_, model.config.width).astype(np.float32)
        for name, leaf in params["blocks"]["adaln"].items()
    }
    blocks = params["blocks"] | {"adaln": adaln}
    closed = Model(replace(model.weights, load=lambda: params | {"blocks": blocks}))
    plan = euler(closed, (1.0, 2.0), 8)
    mixtures = routers.Mixtures(closed, 0, plan, routers.RATE)
    costs = Costs(routers._branch_costs(mixtures), groups(plan), 0.45)
    draw = np.random.default_rng(0).normal(size=(1, 4, *model.config.shape))
    given = Trajectories(np.zeros(1), np.float32(draw), np.arange(4, dtype=np.int32))
    start = jax.random.normal(jax.random.key(0), costs.of.shape)
    found = routers.trained(mixtures, costs, given, 0, tmp_path / "router.npz")
    fell = np.asarray(found.router.logits < start)
    assert fell[costs.free, :, 1].all() and not fell[[0, 4]].any()
    assert (found.worth[costs.free, :, 1] == 0).all() and found.worth.max() > 0
    assert found.weights[costs.free].min() > 0 and not found.weights[[0, 4]].any()
    logits = np.asarray(found.router.logits)
    # More than the share is above the threshold all the while, so that the price rises
    assert costs.spent(costs.fixed | (logits > LEAST)) > costs.share
    state = routers.router_of(start, routers.RATE)
    begun = routers.Training(0, state, 0.0, found.weights, found.worth)
    first = routers.renewed(mixtures, costs, begun, *routers._batch(given, 0))
    assert found.price > 1.5 * first.price > 0
    masks = static_masks(costs, logits, found.worth, 4)
    assert masks[costs.free][..., 0].any() and not masks[costs.free][..., 1].any()


def test_a_network_without_branches_is_refused(model, short, tmp_path):
    params = model.params
    adaln = jax.tree.map(np.zeros_like, params["blocks"]["adaln"])
    blocks = params["blocks"] | {"adaln": adaln}
    empty = Model(replace(model.weights, load=lambda: params | {"blocks": blocks}))
    with pytest.raises(RunError, match="train the model"):
        tune(empty, replace(ASKED, out=str(tmp_path / "plan.json")))


def test_the_flags_arrive(small_run, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "ppflow_jax.tune.command.tune_router", lambda m, a: asked.append(a) or "done"
    )
    flags = ("--cfg=1,2", "--noises=8", "--forecast=harmonica", "--steps=8", "--share=0.6")
    code, _, err = commands.run("tune.__main__", f"--checkpoint={small_run}", *flags)
    assert code == 0, err
    assert asked == [ASKED] and asked[0].command == " ".join(["ppflow tune", *flags])


def changed(**fields):
    return lambda forecast: forecast | fields


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(more=1), "not the keys"),
        (lambda forecast: {k: v for k, v in forecast.items() if k != "depth"}, "not the keys"),
        (changed(place="layers"), "not the keys"),
        (changed(depth=0), "of depth 0"),
        (changed(depth=True), "of depth True"),
        (changed(depth=2, computed=["1111"] * 8), "of 2 blocks, the model has 1"),
        (changed(computed=["11"] * 7), "not 8 texts"),
        (changed(computed=[[1, 1]] * 8), "not 8 texts"),
        (changed(computed=3), "int"),
        (changed(computed=["111"] * 8), "2 times 0 or 1"),
        (changed(computed=["1x"] * 8), "2 times 0 or 1"),
        (changed(computed=["01"] + ["11"] * 7), "at step 0"),
        (changed(computed=["11"] * 4 + ["10"] * 4), "at step 4"),
    ],
)
def test_damaged_and_foreign_masks_are_refused(model, tuned, tmp_path, change, words):
    values = json.loads(tuned[0].read_text())
    values["forecast"] = change(values["forecast"])
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=words) as found:
        model.plan(file)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--steps=8"], "needs --steps and the --share"),
        (["--share=0.5"], "needs --steps and the --share"),
        (["--steps=8", "--share=0"], "more than that, and less than 1"),
        (["--steps=8", "--share=1"], "more than that, and less than 1"),
        (["--steps=8", "--share=0.2"], "0.25 of all branches"),
        (["--steps=8", "--share=nan"], "more than that, and less than 1"),
        (["--steps=2", "--share=0.5"], "give more than 2"),
        (["--steps=101", "--share=0.5"], "up to 100"),
        (["--steps=8", "--share=0.5", "--full=4"], "with --full: the budget of harmonica"),
        (["--steps=8", "--share=0.5", "--evaluations=4"], "with --evaluations"),
        (["--steps=8", "--share=0.5", "--schedule=teacache"], "leave it out with harmonica"),
    ],
)
def test_bad_flags_are_refused(small_run, tmp_path, args, words):
    flags = (f"--checkpoint={small_run}", f"--out={tmp_path}/plan.json", "--forecast=harmonica")
    code, _, err = commands.run("tune.__main__", *flags, *args)
    assert code == 1 and words in err and len(err.splitlines()) == 1, err
    assert not list(tmp_path.iterdir())


def test_a_share_is_for_this_alone(small_run, tmp_path):
    flags = (f"--checkpoint={small_run}", f"--out={tmp_path}/plan.json", "--share=0.5")
    for more, words in (
        (("--evaluations=4",), "are for forecasts"),
        (("--forecast=branch", "--steps=8", "--full=4"), "with --share"),
    ):
        code, _, err = commands.run("tune.__main__", *flags, *more)
        assert code == 1 and words in err, err


def costs_of(seed=0, share=0.6):
    """Two stages of four and three steps, the second three times as expensive."""
    of = np.ones((7, 2, 2)) * np.array([1, 2])
    of[4:] *= 3
    draw = np.random.default_rng(seed)
    return Costs(of, [range(4), range(4, 7)], share), draw.normal(size=(2, *of.shape))


@pytest.mark.parametrize("seed", range(3))
def test_masks_are_the_best_scores_that_the_budget_pays_for(seed):
    costs, (logits, worth) = costs_of(seed)
    masks = static_masks(costs, logits, worth, 9)
    assert masks[[0, 4]].all() and costs.spent(masks) <= 0.6
    free = np.zeros(masks.shape, bool)
    free[costs.free] = True
    assert masks[free].any() and not masks[free].all()
    for left_out in zip(*np.nonzero(free & ~masks)):
        higher = free & masks & (logits > logits[left_out])
        assert np.sum(costs.of[higher]) + costs.of[left_out] > costs.budget


def test_equal_scores_are_ordered_by_their_worth():
    costs, (logits, worth) = costs_of()
    masks = static_masks(costs, 0 * logits, worth, 9)
    assert np.array_equal(masks, static_masks(costs, worth / costs.of, worth, 9))


@pytest.mark.parametrize("most", [1, 2])
def test_masks_are_few_and_near_steps_share_them(most):
    costs, (logits, worth) = costs_of()
    logits[3] = logits[1] + 1e-3  # the nearest two
    masks = static_masks(costs, logits, worth, most)
    for group in costs.groups:
        assert len({masks[i].tobytes() for i in group[1:]}) <= most
    assert np.array_equal(masks[1], masks[3]) and costs.spent(masks) <= 0.6
    assert masks[costs.free].any() and not masks[costs.free].all()


def test_the_price_is_where_the_budget_is_spent():
    costs, (_, worth) = costs_of()
    price = price_of(costs, worth)
    rates = worth / costs.of
    free = np.zeros(worth.shape, bool)
    free[costs.free] = True
    more = free & (rates > price)
    assert np.sum(costs.of[more]) <= costs.budget < np.sum(costs.of[more]) + 6
    few = np.where(np.arange(worth.size).reshape(worth.shape) == 5, 2.0, 0.0)
    assert price_of(costs, few) == 2 / costs.of[1, 0, 1]
    assert price_of(costs, -np.abs(worth)) == 0


def test_a_budget_of_every_size_is_kept():
    for seed, share in itertools.product(range(2), (0.45, 0.7, 0.99)):
        costs, (logits, worth) = costs_of(seed, share)
        for most in (1, 4):
            assert 0.4 < costs.spent(static_masks(costs, logits, worth, most)) <= share
