"""Runs that train a part: what their state holds, their base, and the way to plain weights."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ppflow_jax as pf
from ppflow_jax.checkpoints.run import latest_card
from ppflow_jax.cost.dry_run import dry_run
from ppflow_jax.cost.targets import Target
from ppflow_jax.devices.sharding import make_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.files.store import find_checkpoint, stored_tree
from ppflow_jax.models.trees import joined, leaves, split
from ppflow_jax.systems.adapters import tune
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.init_from import open_start
from ppflow_jax.train.program import make_program
from tests import commands
from tests.systems.checks import random_params

CONSTANT = "--config.optim.schedule=constant"


def experiment_of(name, **mesh):
    config = tune(importlib.import_module("configs.digits").get_config(), name)
    config.model.update(dict(width=32, depth=2, heads=4, pyramid="2x2@1"))  # compiling is its time
    config.data.batch_size = 32
    config.mesh.update(mesh)
    return config


def stepped(name, sizes):
    """One step from random parameters: state and metrics."""
    experiment = Experiment.from_config(experiment_of(name))
    model, key = experiment.card.model, jax.random.key(0)
    devices = jax.devices()[: int(np.prod(sizes))]
    program = make_program(experiment, make_mesh(*sizes, devices=devices))
    params, base = split(random_params(model), experiment.trainable)
    start = jax.tree.map(jnp.zeros_like, program.init(key)) | {"params": params}
    start = jax.device_put(start, program.shardings)
    frozen = jax.device_put({"base": base}, program.frozen_shardings)
    x = jax.random.normal(key, (32, *model.shape))
    batch = {"x": x, "label": jnp.arange(32) % model.num_classes}
    return program.step(0)(start, batch, key, frozen)


@pytest.mark.long
def test_one_device_and_eight_agree():
    found = [stepped("diffscaler", sizes) for sizes in ((1, 1, 1), (1, 4, 2))]
    (state, metrics), (other, measured) = found
    for name, value in metrics.items():
        assert float(value) == pytest.approx(float(measured[name]), rel=5e-5)
    gradients, theirs = (  # a tenth of them
        dict(leaves(jax.device_get(optax.tree.get(s["opt_state"], "mu")))) for s in (state, other)
    )
    assert gradients.keys() == theirs.keys()
    for path, a in gradients.items():
        assert np.abs(a).max() > 0, joined(path)
        assert np.abs(a - theirs[path]).max() < 1e-3 * np.abs(a).max(), joined(path)


@pytest.mark.long
def test_a_dry_run_shows_what_is_saved():
    target = Target("cpu:8", tuple(jax.devices()), None)
    full, part = (
        dry_run(experiment_of(name, data=2, fsdp=2, tensor=2), target, sampler=False)
        for name in ("full", "lora")
    )
    assert part.whole["opt_state"] < 0.3 * full.whole["opt_state"]
    assert part.whole["params"] + part.whole["frozen"] > full.whole["params"]
    assert "frozen" not in full.whole
    (step,) = part.programs
    causes = part.causes(step)
    assert causes and not [c for c in causes if c[0].startswith("unexplained")], causes


@pytest.fixture(scope="module")
def base(tmp_path_factory, small_sit):
    """A SiT made into two levels: the first command of docs/adapters.md."""
    folder = tmp_path_factory.mktemp("adapters") / "two"
    flags = (f"--source={small_sit}", f"--target={folder}", "--pyramid=ppflow2")
    assert commands.run("convert", *flags)[0] == 0
    return folder


def trained(workdir, base, variant, *args):
    """The second command."""
    flags = [f"--config.init_from={base}", CONSTANT, "--config.train.steps=4", *args]
    code, out, err = commands.train(workdir, *flags, variant=f":{variant}")
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "run"
    trained(folder, base, "lora")
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def test_checkpoints_hold_what_is_trained(run, base, small_sit):
    step = find_checkpoint(run)
    state, model = stored_tree(step), pf.load(run)
    trainable = model.card.trainable
    there = {path for path, _ in leaves(state["params"])}
    chosen, frozen = split(model.params, trainable)
    assert {joined(path) for path in there} == {joined(path) for path, _ in leaves(chosen)}
    assert {*map(joined, dict(leaves(state["ema"])))} == {*map(joined, there)}
    stored = jax.tree.leaves(state["opt_state"])
    assert sum(np.prod(leaf.shape) for leaf in stored) < 2.1 * sum(
        leaf.size for leaf in jax.tree.leaves(chosen)
    )
    # the rest is that of the base, and what is trained has changed
    before = dict(leaves(pf.load(base).params))
    for path, leaf in leaves(frozen):
        np.testing.assert_array_equal(leaf, before[path])
    for path, leaf in leaves(chosen):
        if "lora_a" not in path[-1]:
            assert np.any(leaf != before.get(path, 0)), joined(path)


@pytest.mark.long
def test_a_killed_run_goes_on_with_the_same_bits(run, copy):
    shutil.rmtree(copy / "checkpoints" / "4")
    out = trained(copy, "nowhere", "lora")  # the base is known
    assert "continuing from step 2" in out
    for which in ("params", "ema"):
        whole, killed = (commands.weights(folder, which) for folder in (run, copy))
        assert whole.keys() == killed.keys()
        for path, leaf in whole.items():
            assert leaf.tobytes() == killed[path].tobytes(), path


def test_merged_weights_compute_the_same(run, tmp_path):
    """The third command, and a file of PyTorch."""
    target = tmp_path / "merged"
    code, _, err = commands.run("convert", f"--source={run}", f"--target={target}", "--merge")
    assert code == 0, err
    file = tmp_path / "merged.safetensors"
    flags = (f"--source={run}", f"--target={file}", "--to=safetensors")
    code, out, err = commands.run("convert", *flags)
    assert code == 0 and "merged: the PyTorch code has none" in out, err
    ours, merged = pf.load(run), pf.load(target)
    assert not merged.config.adapters and merged.card.base is None
    reading = pf.Reading(heads=2, space="pixels")
    x = jax.random.normal(jax.random.key(0), (4, *ours.config.shape))
    expected = np.asarray(ours(x, 0.3, [0, 1, 2, 3]))
    for model in (merged, pf.load(file, reading=reading)):
        error = np.abs(model(x, 0.3, [0, 1, 2, 3]) - expected).max()
        assert error < 1e-5 * max(1, np.abs(expected).max())
    again = commands.run("convert", f"--source={target}", f"--target={tmp_path}/x", "--merge")
    assert again[0] == 1 and "needs no --merge" in again[2]


def test_a_base_that_has_changed_or_gone_is_refused(run, base, copy, small_sit):
    moved = copy / "base"
    moved.symlink_to(base, target_is_directory=True)  # where it was put after a move
    jax.tree.map(np.testing.assert_array_equal, pf.load(copy).params, pf.load(run).params)
    moved.unlink()
    moved.symlink_to(small_sit, target_is_directory=True)
    with pytest.raises(InputError, match=r"is not the base of .* any more") as error:
        pf.load(copy)
    assert "\n" not in str(error.value) and "a link to them, at" in str(error.value)
    moved.unlink()
    away = base.rename(base.with_name("away"))
    try:
        with pytest.raises(InputError, match=r"its base .* is gone: put the weights"):
            pf.load(copy)
        flags = (f"--config.init_from={away}", CONSTANT, "--config.train.steps=5")
        code, _, err = commands.train(copy, *flags, variant=":lora")
        assert code == 1 and "is gone" in err and len(err.strip().splitlines()) == 1
    finally:
        away.rename(base)


def test_other_classes_start_as_the_null_class(run, base):
    """Of a run that trains its class table."""
    card = pf.load(run).card
    patterns = {"train": {"trainable": ["label/.*"]}}
    config = replace(card.model, num_classes=13)
    task = replace(card, model=config, experiment=patterns)
    params, start = open_start(str(base), task, make_mesh())
    table = np.asarray(start(params, jax.random.key(0))["label"]["embedding"])
    null = np.asarray(params["label"]["embedding"])[-1]
    np.testing.assert_array_equal(table, np.stack([null] * 14))
    with pytest.raises(InputError, match="num_classes: 10 -> 13"):
        open_start(str(base), replace(task, base=None, experiment=None), make_mesh())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config.init_from="], "config.init_from"),
        (["--config.train.trainable=('blocks/fc9/.*',)"], "'blocks/fc9/.*' is no leaf"),
        (["--config.train.trainable=('.*bias(',)"], "no regular expression"),
        (["--config.train.trainable=('.*bias',)"], "is not trained, and its base"),
    ],
)
def test_what_cannot_be_trained_is_refused(base, tmp_path, args, words):
    flags = [f"--config.init_from={base}", *args]
    code, _, err = commands.train(tmp_path / "run", *flags, variant=":lora")
    assert code == 1 and words in err and len(err.strip().splitlines()) == 1, err
    assert latest_card(tmp_path / "run") is None


def test_another_part_is_another_run(run, base, copy):
    flags = ("--config.train.trainable=('.*',)", "--config.resume_changed=true", CONSTANT)
    code, _, err = commands.train(copy, f"--config.init_from={base}", *flags, variant=":lora")
    assert code == 1 and "train.trainable" in err and "use another --workdir" in err


def test_adapters_stay_or_are_merged_before_another_run(run, tmp_path):
    flags = (f"--config.init_from={run}", "--config.train.steps=1")
    code, _, err = commands.train(tmp_path / "run", *flags, variant=":difffit")
    assert code == 1 and "has adapters lora" in err and "--merge" in err
    # a run of the same adapters starts from them, whatever it trains
    model = pf.load(run)
    params, start = open_start(str(run), model.card, make_mesh())
    jax.tree.map(np.testing.assert_array_equal, start(params, jax.random.key(0)), model.params)
