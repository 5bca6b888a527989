"""Plans that are fitted to a model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import ppflow_jax as pf
from ppflow_jax.api.model import Model
from ppflow_jax.api.run_samples import RunSamples
from ppflow_jax.checkpoints.weights import Weights
from ppflow_jax.errors import InputError
from ppflow_jax.flow.fitted import stepwise
from ppflow_jax.flow.multistep import adams_bashforth
from ppflow_jax.flow.sampler import image_noise
from ppflow_jax.generate.plan_file import PlanFile
from ppflow_jax.serve.app import Service
from ppflow_jax.serve.ask import parse
from ppflow_jax.serve.batcher import Batcher
from ppflow_jax.serve.device import Device, Row
from ppflow_jax.tune.calibrate import Trajectories, grid_of
from ppflow_jax.tune.fit import Field, _batches, closed_form, distance, error, refined
from tests import commands

SHAPE = (12, 4, 4, 1)
FREQUENCY = np.random.default_rng(0).uniform(1, 6, SHAPE)


class Analytic(Field):
    """x' = cos(f t) x, f of every element."""

    def __init__(self):
        pass

    def at(self, x, t, y, stage, scale):
        return np.cos(FREQUENCY * t) * x


def along(times, rows):
    """States of the rule at all times, float64."""
    x, history, states = np.random.default_rng(1).normal(size=SHAPE), [], []
    for i, t in enumerate(times):
        states.append(x)
        if i < len(rows.weights):
            history = [Analytic().at(x, t, None, 0, 1.0), *history]
            x = x + sum(w * v for w, v in zip(rows.weights[i, 1:], history))
    return Trajectories(times, np.stack(states), np.zeros(len(x), np.int32))


@pytest.mark.parametrize("order", [2, 3, 4])
def test_the_rows_of_a_rule_are_found_from_its_own_trajectory(order):
    times = np.float64(np.float32(np.linspace(0, 1, 13) ** 1.2))
    rule = adams_bashforth(order, times)
    given = along(times, rule)
    plan = stepwise(times, (0,) * 12, (1.0,), adams_bashforth(2, times))
    fitted, ends = closed_form(Analytic(), plan, given)
    np.testing.assert_allclose(fitted.rows.weights[:, : order + 1], rule.weights, atol=1e-6)
    np.testing.assert_allclose(fitted.rows.weights[:, order + 1 :], 0, atol=1e-6)
    np.testing.assert_allclose(ends, given.states[-1], atol=1e-6)


def test_a_fit_beats_the_rules_on_trajectories_that_it_has_not_seen():
    times = np.float64(np.float32(np.linspace(0, 1, 7)))
    fine = np.linspace(0, 1, 601)
    exact = along(fine, adams_bashforth(4, fine))
    fit, held_out = exact.part(slice(0, 8)), exact.part(slice(8, None))
    plan = stepwise(times, (0,) * 6, (1.0,), adams_bashforth(2, times))

    class Part(Analytic):
        def at(self, x, t, y, stage, scale):
            return np.cos(FREQUENCY[y] * t) * x

    fit, held_out = (
        replace(given, labels=np.arange(*rows))
        for given, rows in ((fit, (0, 8)), (held_out, (8, 12)))
    )
    fitted, _ = closed_form(Part(), plan, fit)

    def left(rows):
        x, history = held_out.states[0], []
        for i, t in enumerate(times[:-1]):
            history = [Part().at(x, t, held_out.labels, 0, 1.0), *history]
            x = x + sum(w * v for w, v in zip(rows.weights[i, 1:], history))
        return distance(x, held_out)

    rules = [left(adams_bashforth(order, times)) for order in (1, 2, 3, 4)]
    assert left(fitted.rows) < 0.9 * min(rules)


@pytest.fixture(scope="module")
def model(small_run):
    return pf.load(small_run)


@pytest.fixture(scope="module")
def tuned(small_run, tmp_path_factory):
    """A plan of the command, made twice, and what the command said."""
    folder, files = tmp_path_factory.mktemp("tuned"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ppflow_jax.tune.command.ROUNDS", 10)
        patch.setattr("ppflow_jax.tune.calibrate.FINE", 12)
        for name in ("plan", "again"):
            flags = ("--cfg=1,2", "--evaluations=3", "--noises=8", f"--out={folder}/{name}.json")
            code, said, err = commands.run("tune.__main__", f"--checkpoint={small_run}", *flags)
            assert code == 0, err
            files.append(folder / f"{name}.json")
    return *files, said


def test_a_plan_fitted_twice_has_the_same_bytes(tuned):
    first, second, said = tuned
    assert first.read_bytes() == second.read_bytes()
    errors = json.loads(first.read_text())["made"]["held_out_errors"]
    for name, value in errors.items():
        assert f"{value:.4f}" in next(line for line in said.splitlines() if name in line)
    assert errors["plan"] < errors["euler"]


def test_the_command_and_the_api_sample_it_alike(small_run, model, tuned, tmp_path):
    flags = (f"--checkpoint={small_run}", "--num=4", "--save_latents", f"--plan={tuned[0]}")
    code, _, err = commands.run("sample", *flags, f"--out={tmp_path}/out")
    assert code == 0 and "fitted" not in err, err
    plan = model.plan(tuned[0])
    assert plan.nfe == 3 and not plan.notes
    latents = np.load(tmp_path / "out" / "latents.npy")
    np.testing.assert_array_equal(model.sample(4, plan=plan).latents, latents)
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert plan.tuned.sha256 in json.dumps(card)
    code, out, err = commands.run("sample", *flags, "--explain", f"--out={tmp_path}/none")
    assert code == 0 and "of SiT with the same steps" in out, err
    other = model.plan(tuned[0], cfg=(1, 3))
    assert "fitted with guidance 1,2" in other.notes[0]
    assert (model.sample(4, plan=other).latents != latents).any()


def test_scales_of_steps_stay_under_the_guidance_of_their_fit(model, tuned, tmp_path):
    plan = PlanFile.read(tuned[0])
    guided = [stage == 1 for stage in plan.fitted.stages]
    scales = tuple(2 + 0.125 * (1 + i) if g else 1.0 for i, g in enumerate(guided))
    fitted = replace(plan, fitted=replace(plan.fitted, scales=scales))

    def scales_of(**given):
        segments = model.plan(fitted, **given).segments
        return tuple(s.scales[0] for s in segments for _ in range(s.steps))

    assert scales_of() == scales_of(cfg=(1, 2)) == scales
    assert scales_of(cfg=(1, 3)) == tuple(3.0 if g else 1.0 for g in guided)


def test_a_plan_of_eulers_rows_is_eulers_method_bit_for_bit(model, tmp_path):
    times, pyramid = grid_of(model, (3, 3)), model.config.pyramid
    rows = adams_bashforth(1, times)
    fitted = stepwise(times, (0,) * 3 + (1,) * 3, (1.0, 2.0), rows)
    PlanFile(fitted, pyramid, model.card.flow, (1.0, 2.0)).write(tmp_path / "euler.json")
    ours = model.sample(8, plan=model.plan(tmp_path / "euler.json"))
    euler = model.sample(8, plan=model.plan(steps=6, solver="euler", cfg=(1, 2)))
    np.testing.assert_array_equal(ours.latents, euler.latents)


def changed(**fields):
    return lambda values: values | fields


@pytest.mark.long
def test_scales_of_guided_steps_are_fitted_and_others_stay(model):
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.2 * draw.normal(size=p.shape), model.params)
    params = jax.tree.map(np.float32, params)
    weights = Weights(model.card, Path("none"), "ema", lambda: params)
    field = Field(Model(weights))
    ids, labels = np.arange(8), np.arange(8, dtype=np.int32)
    noise, _ = image_noise(np.uint32(0), ids, model.config.shape)
    way = field.model.plan(steps=12, cfg=(1, 3))
    states = field.model.trajectory(plan=way, labels=labels, noise=noise)
    given = Trajectories(np.float64(way.times), states, labels)
    times = grid_of(model, (1, 2))
    plan = stepwise(times, (0, 1, 1), (1.0, 2.0), adams_bashforth(4, times))
    fitted = refined(field, plan, given, 8, scales=True)
    assert fitted.scales[0] == 1 and all(2.02 < scale < 3 for scale in fitted.scales[1:])
    assert error(field, fitted, given) < error(field, plan, given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: [], "no plan of format 1"),
        (changed(format=2), "no plan of format 1"),
        (lambda values: {k: v for k, v in values.items() if k != "times"}, "no 'times'"),
        (changed(times=[0.0, 0.5, 0.4, 1.0]), "times do not increase"),
        (changed(times=[0.0, 0.2, 0.4, 1.5]), "not in"),
        (changed(stages=[0, 1, 2]), "numbers below 2"),
        (changed(stages=[0]), "numbers below 2"),
        (changed(scales=[1.0, "x"]), "could not convert"),
        (changed(weights=[[1.0]]), "finite numbers"),
        (changed(weights=[[float("nan")] * 5] * 3), "finite numbers"),
        (changed(rule={"basis": "magic", "history": 4, "corrects": False}), "unknown rule"),
        (changed(rule={"basis": "velocity"}), "history"),
        (changed(corrector=[[1.0]]), "corrector"),
        (changed(cfg=[1.0]), "cfg not one of every stage"),
        (changed(pyramid="2x2@1"), "numbers below 1|another pyramid"),
        (changed(pyramid="4x4@0.4,2x2@1"), "another pyramid"),
        (changed(pyramid=3), "cannot read '3'"),
        (changed(flow={"path": "gvp", "prediction": "velocity"}), "another path and prediction"),
        (changed(flow={"path": "straight"}), "unknown path"),
        (changed(made=[]), "made of another kind"),
    ],
)
def test_damaged_and_foreign_plans_are_refused(model, tuned, tmp_path, change, words):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(change(json.loads(tuned[0].read_text()))))
    with pytest.raises(InputError, match=words) as found:
        model.plan(file)
    assert "\n" not in str(found.value)


def test_a_file_that_is_no_text_and_settings_that_a_plan_decides(model, tuned, tmp_path):
    (tmp_path / "cut.json").write_bytes(tuned[0].read_bytes()[:100])
    (tmp_path / "binary.json").write_bytes(bytes(range(256)))
    for name, words in (("cut", "damaged"), ("binary", "no text"), ("absent", "No such file")):
        with pytest.raises(InputError, match=words):
            model.plan(tmp_path / f"{name}.json")
    with pytest.raises(InputError, match="decides steps, grid"):
        model.plan(tuned[0], steps=8, grid="reference")
    values = json.loads(tuned[0].read_text())
    values["made"]["checkpoint_sha256"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(values))
    assert "other weights" in model.plan(tmp_path / "other.json").notes[0]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give one budget"),
        (["--evaluations=8", "--ms=3"], "give one budget"),
        (["--choose_patches", "--evaluations=8"], "needs --evaluations and a budget"),
        (["--evaluations=8", "--out=/"], "is a folder"),
        (["--evaluations=8", "--fit_scales", "--norefine"], "leave out --norefine"),
        (["--evaluations=1"], "less than one step of each of 2"),
        (["--evaluations=0"], "above 0"),
        (["--flops=nan"], "above 0"),
        (["--evaluations=8", "--noises=2"], "at least 8"),
        (["--evaluations=8", "--cfg=1,2,3"], "give 1 or 2"),
        (["--evaluations=8", "--cfg_channels=9"], "the model has 1 channels"),
    ],
)
def test_bad_flags_are_refused(small_run, tmp_path, args, words):
    flags = (f"--checkpoint={small_run}", f"--out={tmp_path}/plan.json", *args)
    code, _, err = commands.run("tune.__main__", *flags)
    assert code == 1 and words in err and len(err.splitlines()) == 1, err
    assert not list(tmp_path.iterdir())


def test_a_damaged_calibration_is_named(small_run, tuned, monkeypatch):
    part = sorted(tuned[0].parent.glob("calibration-*/*.npy"))[0]
    kept, states = part.read_bytes(), np.load(part)
    flags = ("--cfg=1,2", "--evaluations=3", "--noises=8", f"--out={tuned[0].parent}/new.json")
    monkeypatch.setattr("ppflow_jax.tune.calibrate.FINE", 12)
    for damage in (kept[:1000], states[:, 1:], np.full_like(states, np.nan), states.astype("f8")):
        if isinstance(damage, bytes):
            part.write_bytes(damage)
        else:
            np.save(part, damage)
        code, _, err = commands.run("tune.__main__", f"--checkpoint={small_run}", *flags)
        assert code == 1 and "is damaged" in err and "remove it" in err, err
    part.write_bytes(kept)


def test_batches_are_the_same_every_time_and_take_all_in_turn():
    first, again = (list(_batches(24, 6)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.bincount(np.concatenate(first)).tolist() == [4] * 24


def test_auto_is_the_plan_in_the_folder_of_the_run(small_run, tuned, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    assert pf.load(run).plan(accelerate="auto", cfg=(1, 2)).tuned is None
    (run / "plan.json").write_bytes(tuned[0].read_bytes())
    plan = pf.load(run).plan(accelerate="auto", cfg=(1, 2))
    assert plan.nfe == 3 and not plan.notes
    for flags, words in (
        (["--accelerate=auto", "--steps=8"], "decides steps"),
        ([f"--plan={tuned[0]}", "--solver=heun"], "--plan decides --solver"),
    ):
        out = f"--out={tmp_path}/out"
        code, _, err = commands.run("sample", f"--checkpoint={run}", "--num=2", out, *flags)
        assert code == 1 and words in err, err


def test_a_file_has_its_plan_beside_it(small_run, tuned, tmp_path):
    """And not in a folder further up, where a run would have it."""
    folder = tmp_path / "weights" / "of" / "mine"
    flags = (f"--source={small_run}", "--to=torch", f"--target={folder}/m.pt")
    folder.mkdir(parents=True)
    code, _, err = commands.run("convert.__main__", *flags)
    assert code == 0, err
    reading = pf.Reading(heads=2, space="pixels")
    for place, found in ((folder.parents[1], False), (folder.parent, False), (folder, True)):
        shutil.copy(tuned[0], place / "plan.json")
        plan = pf.load(folder / "m.pt", reading=reading).plan(accelerate="auto", cfg=(1, 2))
        assert (plan.tuned is not None) == found
    assert "other weights" in plan.notes[0]


def test_the_service_and_the_evaluation_take_a_plan(small_run, model, tuned):
    service = Service(Batcher(Device(model, "none", 2), 16), PlanFile.read(tuned[0]))
    ask = parse(b'{"label": 1, "guidance": [1, 2], "preset": "tuned"}', model, service.presets)
    way = service.way(ask.steps, ask.solver, ask.preset, ask.guidance, False)
    (made,) = service.batcher.device.run(way, [Row(1, 0, 0), Row(1, 0, 1)])
    expected = model.sample(2, plan=model.plan(tuned[0]), labels=1).pictures
    np.testing.assert_array_equal(made.clean, expected)
    with pytest.raises(InputError, match="exact, balanced, fast"):
        parse(b'{"label": 1, "preset": "tuned"}', model)
    judged = RunSamples(str(small_run), num=4, seed=0, decode="none", plan=str(tuned[0]))
    assert judged.plan.nfe == 3
    assert judged.card["settings"]["plan_sha256"] == PlanFile.read(tuned[0]).sha256
