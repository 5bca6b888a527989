"""What every task passes from configuration to samples, on one device and on eight.

Trains a small one of docs/conditions.md.
"""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import ppflow_jax as pf
from configs import digits_tasks
from ppflow_jax.autoencoders.decode import Decoder
from ppflow_jax.cost.dry_run import dry_run
from ppflow_jax.cost.targets import Target
from ppflow_jax.data.sources import digits
from ppflow_jax.devices.sharding import leaf_path, make_mesh
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.generate.run_pictures import RunPictures
from ppflow_jax.models.conditions import Channels
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.network import abstract_params
from ppflow_jax.pyramid import PPFLOW3
from ppflow_jax.systems.registry import take_conditions
from ppflow_jax.systems.tasks import Inpainting
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.inputs import make_inputs, shown_to
from ppflow_jax.train.program import make_program
from tests import commands
from tests.systems.checks import random_params

DROPPED = ("channels:name=known,channels=2,drop=0.5",)


def experiment_of(**mesh):
    config = digits_tasks.get_config("inpainting")
    config.model.update(dict(width=16, depth=1, heads=2, conditions=DROPPED))
    config.data.batch_size = 32
    config.sample.update(dict(solver="euler", steps=2))
    config.mesh.update(mesh)
    return config


@pytest.mark.long
def test_a_dry_run_finds_nothing_unexplained():
    config = experiment_of(data=2, fsdp=2, tensor=2)
    report = dry_run(config, Target("cpu:8", tuple(jax.devices()), None))
    for program in report.programs:
        causes = report.causes(program)
        assert not [c for c in causes if c[0].startswith("unexplained")], causes
    assert len(report.programs) == 2


def test_rules_cover_every_large_leaf():
    known = tuple(kind.replace("2,", "16,") for kind in DROPPED)  # channels of large latents
    conditions = take_conditions({"conditions": (*known, "scalar:name=w")})
    model = ModelConfig(PPFLOW3, 32, 4, **SIZES["B"], num_classes=1000, conditions=conditions)
    params = abstract_params(model)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params["conditions"]):
        assert leaf.size < 0.01 * total, leaf_path(path)  # on every device, like patch projections


@pytest.mark.long
def test_one_device_and_eight_agree():
    """With accumulation on eight: the rows of conditions stay with their images."""
    model, key = Experiment.from_config(experiment_of()).card.model, jax.random.key(0)
    x = jax.random.normal(key, (32, *model.shape))
    known = Inpainting()(x, key)
    batch = {"x": x, "label": jnp.arange(32) % model.num_classes, "known": known}
    found = []
    for sizes, accumulate in (((1, 1, 1), 1), ((2, 2, 2), 2)):
        config = experiment_of()
        config.train.accumulate = accumulate
        devices = jax.devices()[: int(np.prod(sizes))]
        program = make_program(Experiment.from_config(config), make_mesh(*sizes, devices=devices))
        start = jax.tree.map(jnp.zeros_like, program.init(key)) | {"params": random_params(model)}
        state, metrics = program.step(0)(jax.device_put(start, program.shardings), batch, key, {})
        gradients = optax.tree.get(state["opt_state"], "mu")  # a tenth of them
        found.append(({k: float(v) for k, v in metrics.items()}, jax.device_get(gradients)))
    (one, gradients), (eight, others) = found
    assert one == pytest.approx(eight, rel=5e-5)
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    for (path, a), b in zip(leaves, jax.tree.leaves(others)):
        assert np.abs(a).max() > 0, leaf_path(path)
        assert np.abs(a - b).max() < 1e-3 * np.abs(a).max(), leaf_path(path)


def test_one_draw_drops_a_condition_only_with_the_label_where_that_is_dropped_more():
    objective = Experiment.from_config(experiment_of()).objective
    x, label = jnp.ones((4000, 8, 8, 1)), jnp.arange(4000) % 10
    known = jnp.ones((4000, 8, 8, 2))
    batch = {"x": x, "label": label, "known": known}
    told = objective.draw(jax.random.key(0), batch).labels
    no_label = np.asarray(told["label"] == 10)
    no_value = np.asarray(told["known"] == 0).all(axis=(1, 2, 3))
    assert np.asarray(told["known"] == 1).all(axis=(1, 2, 3))[~no_value].all()
    assert no_label.mean() == pytest.approx(0.1, abs=0.02)
    assert no_value.mean() == pytest.approx(0.5, abs=0.03)
    assert no_value[no_label].all()
    plain = Experiment.from_config(digits_tasks.digits.get_config()).objective
    labels = plain.draw(jax.random.key(0), {"x": x, "label": label}).labels
    np.testing.assert_array_equal(labels, told["label"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_run):
    """A base model told more, as one run and as one that was killed."""
    root = tmp_path_factory.mktemp("tasks")
    flags = ["--config.data.task=inpainting", f"--config.init_from={small_run}"]
    flags += ["--config.train.steps=4", "--config.train.accumulate=1"]
    code, _, err = commands.train(root / "whole", *flags)
    assert code == 0, err
    shutil.copytree(root / "whole", root / "killed")
    shutil.rmtree(root / "killed" / "checkpoints" / "4")
    code, out, err = commands.train(root / "killed", *flags)
    assert code == 0 and "continuing from step 2" in out, err
    return root


@pytest.mark.long
def test_a_killed_run_goes_on_with_the_same_bits(runs):
    whole, killed = (commands.weights(runs / run) for run in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    for path, leaf in whole.items():
        assert leaf.tobytes() == killed[path].tobytes(), path
    assert all(np.abs(whole[f"conditions/known/{i}/kernel"]).max() > 0 for i in range(2))


@pytest.mark.long
def test_another_task_is_another_run(runs):
    code, _, err = commands.train(runs / "whole", "--config.data.task=inpainting:least=0.5")
    assert code == 1 and "data.task: inpainting:least=0.25,most=0.75 -> inpainting:least=0.5" in err


@pytest.mark.long
def test_a_run_shows_what_it_makes_of_the_first_examples(runs):
    model = pf.load(runs / "whole")
    assert model.config.conditions == (Channels("known", 2),)
    told = shown_to(
        model.card, digits(), make_inputs(None, make_mesh(), 0, Inpainting()), make_mesh(), 8
    )
    np.testing.assert_array_equal(told["label"], digits().labels[:8])
    mask, values = told["known"][..., :1], told["known"][..., 1:]
    np.testing.assert_array_equal(values, mask * digits().x[:8])
    plan = model.plan(steps=2, solver="euler", cfg=2)
    made = model.sample(plan=plan, labels=told["label"], conditions={"known": told["known"]})
    config = SamplerConfig("euler", 2, cfg=(2.0,))
    pictures = RunPictures(Decoder(model.card), config, told=told, seed=0, mesh=make_mesh())
    np.testing.assert_allclose(pictures(model.params), made.pictures, atol=1)
    grid = Image.open(runs / "whole" / "samples" / "step_0000004.png")
    assert grid.size == (8 * 66, 66)
