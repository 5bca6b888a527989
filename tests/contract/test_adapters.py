"""Runs that train a part: what their state holds, their base, and the way to plain weights."""

from __future__ import annotations

import importlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ppflow_jax as pf
from ppflow_jax.cost.dry_run import dry_run
from ppflow_jax.cost.targets import Target
from ppflow_jax.devices.sharding import make_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.files.store import find_checkpoint, stored_tree
from ppflow_jax.models.trees import joined, leaves, split
from ppflow_jax.systems.adapters import PRESETS, tune
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.program import make_program
from tests import commands
from tests.systems.checks import random_params

PARTS = PRESETS.keys() - {"full"}


def experiment_of(name, **mesh):
    config = tune(importlib.import_module("configs.digits").get_config(), name)
    config.model.update(dict(width=32, depth=2, heads=4))
    config.data.batch_size = 32
    config.mesh.update(mesh)
    return config


def stepped(name, sizes):
    """One step from random parameters: state, frozen, metrics."""
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
    return (*program.steps[0].run(start, batch, key, frozen), frozen)


def test_one_device_and_eight_agree():
    found = [stepped("diffscaler", sizes) for sizes in ((1, 1, 1), (1, 8, 1), (2, 2, 2))]
    (state, metrics, _), *others = found
    gradients = jax.device_get(optax.tree.get(state["opt_state"], "mu"))  # a tenth of them
    for other, measured, _ in others:
        for name, value in metrics.items():
            assert float(value) == pytest.approx(float(measured[name]), rel=5e-5)
        theirs = jax.device_get(optax.tree.get(other["opt_state"], "mu"))
        for (path, a), b in zip(leaves(gradients), jax.tree.leaves(theirs)):
            assert np.abs(a).max() > 0, joined(path)
            assert np.abs(a - b).max() < 1e-3 * np.abs(a).max(), joined(path)


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
    flags = [f"--config.init_from={base}", "--config.train.steps=4", *args]
    code, out, err = commands.train(workdir, *flags, variant=f":{variant}")
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "run"
    trained(folder, base, "diffscaler")
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
    fresh = {"gamma": 1, "beta": 0, "lora_b": 0}
    for path, leaf in leaves(chosen):
        old = fresh.get(path[-1].removeprefix("qkv_"), before.get(path))
        if old is not None and path[0] != "patchify":
            assert np.any(leaf != old), joined(path)


def test_a_killed_run_goes_on_with_the_same_bits(run, copy):
    shutil.rmtree(copy / "checkpoints" / "4")
    out = trained(copy, "nowhere", "diffscaler")  # the base is known
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
    for stage, t in enumerate((0.3, 0.7)):
        expected = np.asarray(ours(x, t, [0, 1, 2, 3], stage))
        for model in (merged, pf.load(file, reading=reading)):
            error = np.abs(model(x, t, [0, 1, 2, 3], stage) - expected).max()
            assert error < 1e-5 * max(1, np.abs(expected).max())
    again = commands.run("convert", f"--source={target}", f"--target={tmp_path}/x", "--merge")
    assert again[0] == 1 and "needs no --merge" in again[2]


def test_a_base_that_has_changed_or_gone_is_refused(run, base, copy, small_run):
    moved = copy / "base"
    moved.symlink_to(base, target_is_directory=True)  # where it was put after a move
    expected = pf.load(run).sample(2).latents
    np.testing.assert_array_equal(pf.load(copy).sample(2).latents, expected)
    moved.unlink()
    moved.symlink_to(small_run, target_is_directory=True)
    with pytest.raises(InputError, match=r"is not the base of .* any more") as error:
        pf.load(copy)
    assert "\n" not in str(error.value) and "a link to them, at" in str(error.value)
    moved.unlink()
    away = base.rename(base.with_name("away"))
    try:
        with pytest.raises(InputError, match=r"its base .* is gone: put the weights"):
            pf.load(copy)
        code, _, err = commands.train(
            copy, f"--config.init_from={away}", "--config.train.steps=5", variant=":diffscaler"
        )
        assert code == 1 and "is gone" in err and len(err.strip().splitlines()) == 1
    finally:
        away.rename(base)


def test_tasks_on_one_base_leave_each_other_alone(run, base, tmp_path):
    """The second has other classes, which start as the null class of the base."""
    before = pf.load(run).sample(2, labels=[3]).latents
    trained(tmp_path / "task", base, "difffit", "--config.model.num_classes=13")
    np.testing.assert_array_equal(pf.load(run).sample(2, labels=[3]).latents, before)
    table = np.asarray(pf.load(tmp_path / "task").params["label"]["embedding"])
    null = np.asarray(pf.load(base).params["label"]["embedding"])[-1]
    assert table.shape == (14, 16)
    np.testing.assert_array_equal(table[10:13], np.stack([null] * 3))  # digits have ten classes


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
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_another_part_is_another_run(run, base, copy):
    code, _, err = commands.train(
        copy,
        f"--config.init_from={base}",
        "--config.train.trainable=('.*',)",
        "--config.resume_changed=true",
        variant=":diffscaler",
    )
    assert code == 1 and "train.trainable" in err and "use another --workdir" in err


def test_adapters_stay_or_are_merged_before_another_run(run, tmp_path):
    code, _, err = commands.train(tmp_path / "a", f"--config.init_from={run}", variant=":lora")
    assert code == 1 and "has adapters affiner" in err and "--merge" in err
    # a run of the same adapters goes on from them, here with everything trained
    flags = (f"--config.init_from={run}", "--config.train.steps=1", "--config.optim.lr=1e-9")
    code, out, err = commands.train(tmp_path / "b", *flags)
    assert code == 0 and "adapters affiner" in out, err
    assert pf.load(tmp_path / "b").card.base is None
    for name, leaf in commands.weights(tmp_path / "b").items():
        np.testing.assert_allclose(leaf, commands.weights(run, "ema")[name], atol=1e-6)
