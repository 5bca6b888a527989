"""Objectives other than the flow, from configuration to samples: what every one of them passes."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ppflow_jax as pf
from configs import digits, digits_few_steps
from ppflow_jax.api.model import Model
from ppflow_jax.checkpoints.card import Card
from ppflow_jax.cost.dry_run import dry_run
from ppflow_jax.cost.targets import Target
from ppflow_jax.devices.programs import for_training
from ppflow_jax.devices.sharding import leaf_path, make_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.systems.registry import OBJECTIVES
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.program import make_program
from tests import commands
from tests.systems.checks import random_params

VARIANTS = ("meanflow", "guided", "halved", "mmd")
each = pytest.mark.parametrize("name", VARIANTS)
# What takes long, of one of each class of objectives
some = pytest.mark.parametrize("name", ["meanflow", "guided", "mmd"])


def train(workdir, name, *flags):
    config = f"--config={commands.ROOT}/configs/digits_few_steps.py:{name}"
    objectives = {"meanflow": "meanflow:points=0.5", "halved": "halved:steps=2"}
    objective = (objectives | {"mmd": "mmd:steps=2,scale=2"}).get(name)
    chosen = [f"--config.flow.objective={objective}"] if objective else []
    jumps = ["--config.sample.solver=meanflow"] if name == "meanflow" else []
    batch = ["--config.data.batch_size=128", "--config.train.steps=4"]
    args = [config, f"--workdir={workdir}", *commands.SMALL, *batch, *chosen, *jumps, *flags]
    return commands.run("main", *args)


def experiment_of(name, **mesh):
    config = digits_few_steps.get_config(name)
    config.model.update(dict(width=32, depth=2, heads=4))
    config.data.batch_size = 128
    config.mesh.update(mesh)
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_run):
    """MeanFlow, a student of the small run and its student, the small run fine-tuned: the commands
    of docs/meanflow.md, docs/guided_distillation.md and docs/mmd.md."""
    folder = tmp_path_factory.mktemp("few")
    teachers = {"guided": small_run, "mmd": small_run}
    teachers["halved"] = folder / "guided"
    for name in VARIANTS:
        teacher = teachers.get(name)
        flags = [f"--config.train.teacher={teacher}"] if teacher else []
        code, out, err = train(folder / name, name, *flags)
        assert code == 0, err
        assert ("weights from" in out) == (teacher is not None)
    return folder


def test_every_kind_is_here():
    others = {"distil", "dense2moe", "dydit", "ppcl"}  # which have tests of their own
    assert {*VARIANTS, *others} == set(OBJECTIVES)
    plain = Experiment.from_config(digits.get_config()).objective
    assert isinstance(plain, FlowObjective) and not plain.frozen


@pytest.mark.long
@each
def test_the_card_says_which_objective_trained_it(runs, name):
    card = pf.load(runs / name).card
    assert Card.from_json(json.loads(json.dumps(card.to_json()))) == card
    assert card.experiment["flow"]["objective"].startswith(name)
    names = [condition.name for condition in card.model.conditions]
    assert names == {"meanflow": ["interval"], "mmd": []}.get(name, ["guidance"])


@pytest.mark.long
@some
def test_a_killed_run_goes_on_with_the_same_bits(runs, tmp_path, name):
    shutil.copytree(runs / name, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
    teacher = json.loads((runs / name / "config.json").read_text())["experiment"]["train"]
    flags = [f"--config.train.teacher={teacher['teacher']}"] if teacher["teacher"] else []
    code, out, err = train(tmp_path / "killed", name, *flags)
    assert code == 0 and "continuing from step 2" in out, err
    whole, killed = (commands.weights(run) for run in (runs / name, tmp_path / "killed"))
    for path, leaf in whole.items():
        assert leaf.tobytes() == killed[path].tobytes(), path


@pytest.mark.long
def test_jumps_from_a_run(runs):
    model = pf.load(runs / "meanflow")
    for steps in (1, 2, 4):
        plan = model.plan(solver="meanflow", steps=steps)
        assert plan.nfe == steps and np.isfinite(model.sample(2, plan=plan).latents).all()
    code, out, err = commands.run(
        "sample",
        f"--checkpoint={runs / 'meanflow'}",
        "--out=unused",
        "--solver=meanflow",
        "--steps=1",
        "--explain",
    )
    assert code == 0 and "0.000-1.000" in out and "4x4" in out and "2x2" not in out, err
    # The velocity itself, by any other solver
    assert np.isfinite(model.sample(2, plan=model.plan(steps=2, solver="heun")).latents).all()
    x, t = jnp.ones((1, *model.config.shape)), 0.3
    np.testing.assert_array_equal(model(x, t, [3]), model.velocity(x, t, [3]))


@pytest.mark.long
def test_guidance_is_one_evaluation_of_a_student(runs, small_run):
    student, teacher = pf.load(runs / "guided"), pf.load(small_run)
    two, one = (m.plan(steps=4, solver="euler", cfg=2) for m in (teacher, student))
    assert np.isfinite(student.sample(2, plan=one).latents).all()
    assert "embedded 2" in one.explain() and "embedded" not in two.explain()
    # A run so short hardly knows the scale: of other weights it shows
    params = jax.tree.map(lambda leaf: leaf / 3, random_params(student.config))
    noisy = Model(replace(student.weights, load=lambda: params))
    found = [noisy.sample(2, plan=noisy.plan(steps=2, solver="euler", cfg=s)) for s in (1, 2, 3)]
    for a, b in zip(found, found[1:]):
        assert np.abs(a.latents - b.latents).max() > 1e-3
    code, out, err = commands.run(
        "sample",
        f"--checkpoint={runs / 'guided'}",
        "--out=unused",
        "--cfg=2",
        "--steps=2",
        "--explain",
    )
    assert code == 0 and "embedded 2" in out, err
    note = student.plan(steps=4, cfg=9).notes
    assert note == ("guidance 9 is outside 1 to 4, on which the model was distilled",)


@pytest.mark.long
def test_what_is_wrong_ends_in_a_line(runs, small_run, tmp_path):
    jumping, student, halved, tuned = (pf.load(runs / name) for name in VARIANTS)
    for make, words in (
        (lambda: pf.load(small_run).plan(solver="meanflow", steps=2), "trained with the objective"),
        (lambda: student.plan(solver="meanflow", steps=2), "trained with the objective"),
        (lambda: jumping.plan(solver="meanflow", steps=2, cfg=2), "leave cfg out, not 2"),
        (lambda: jumping.plan(solver="meanflow", accelerate="fast"), "not meanflow"),
        (lambda: halved.plan(), "distilled to 2 steps, and knows no others"),
        (lambda: student.plan(cfg=2, weak=student), "leave the weak model out"),
        (lambda: student.plan(cfg=2, cfg_channels=1), "leave cfg_channels out"),
    ):
        with pytest.raises(InputError, match=words):
            make()
    assert halved.plan(solver="euler", steps=2, cfg=2).nfe == 2
    assert not tuned.plan(solver="euler", steps=2, cfg=2).notes
    assert "fine-tuned for solver=euler, steps=2, cfg=2" in tuned.plan(steps=3).notes[0]
    teacher = f"--config.train.teacher={small_run}"
    for name, flags, words in (
        ("guided", [], "needs a teacher: give its checkpoint as --config.train.teacher"),
        ("meanflow", [teacher], "takes no teacher"),
        ("guided", [teacher, "--config.model.width=32"], "config.train.teacher=.*another model"),
        ("halved", ["--config.flow.objective=halved:steps=3"], "are not twice 3"),
        ("meanflow", ["--config.flow.objective=jumps"], "unknown objective 'jumps': one of"),
        ("meanflow", ["--config.model.conditions=()"], "needs a model that is told the interval"),
    ):
        code, _, err = train(tmp_path / "wrong", name, *flags)
        assert code and re.search(words, err), (words, err)


def test_kernels_without_forward_mode_are_not_chosen():
    assert for_training("auto", forward_mode=True).attention == "deferred"
    with pytest.raises(InputError, match="no forward-mode derivative"):
        for_training("splash", forward_mode=True)


@pytest.mark.long
@some
def test_one_device_and_eight_agree(name):
    experiment = Experiment.from_config(experiment_of(name))
    model, key = experiment.card.model, jax.random.key(0)
    x = jax.random.normal(key, (128, *model.shape))
    batch = {"x": x, "label": jnp.arange(128) % model.num_classes}
    params, found = jax.tree.map(lambda leaf: np.asarray(leaf / 2), random_params(model)), []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        devices = jax.devices()[: int(np.prod(sizes))]
        program = make_program(experiment, make_mesh(*sizes, devices=devices))
        start = jax.tree.map(jnp.zeros_like, program.init(key)) | {"params": params}
        placed = jax.device_put(params, program.shardings["ema"])
        frozen = {name: placed for name in experiment.objective.frozen}
        step = program.step(0)
        state, metrics = step(jax.device_put(start, program.shardings), batch, key, frozen)
        gradients = optax.tree.get(state["opt_state"], "mu")
        found.append(({k: float(v) for k, v in metrics.items()}, jax.device_get(gradients)))
    (one, gradients), (eight, others) = found
    assert one == pytest.approx(eight, rel=1e-4)
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    for (path, a), b in zip(leaves, jax.tree.leaves(others)):
        assert np.abs(a).max() > 0, leaf_path(path)
        assert np.abs(a - b).max() < 2e-3 * np.abs(a).max(), leaf_path(path)


@pytest.mark.long
def test_a_dry_run_finds_nothing_unexplained():
    """Of derivatives by forward mode on weights that are gathered."""
    config = experiment_of("meanflow", data=2, fsdp=2, tensor=2)
    report = dry_run(config, Target("cpu:8", tuple(jax.devices()), None), sampler=False)
    (step,) = report.programs
    causes = report.causes(step)
    assert causes and not [c for c in causes if c[0].startswith("unexplained")], causes
