"""What a model with students in the place of blocks passes, as every part of a block does."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppflow_jax as pf
from ppflow_jax.checkpoints.card import Card
from ppflow_jax.convert.infer import find_config
from ppflow_jax.convert.keys import key_table, to_torch
from ppflow_jax.convert.load import load_state
from ppflow_jax.cost.dry_run import dry_run
from ppflow_jax.cost.measure import xla_forward_flops
from ppflow_jax.cost.targets import Target
from ppflow_jax.devices.programs import Programs
from ppflow_jax.devices.sharding import RULES, leaf_path
from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.network import abstract_params, make_apply
from ppflow_jax.models.student_blocks import fresh
from ppflow_jax.models.students import parse
from ppflow_jax.pyramid import PPFLOW2, SIT
from ppflow_jax.systems.expand import expanded_config
from ppflow_jax.systems.registry import take_block
from ppflow_jax.train.experiment import Experiment
from tests import commands
from tests.meshes import check_alike, one_and_eight, smaller
from tests.systems.checks import compiled, random_params

BLOCKS = "0:0-1,1:1-2"
BOTH = "0:0-1,0:ffn2,1:ffn0,1:1-2"


def model_of(students=BOTH, **sizes):
    small = dict(latent_size=8, channels=4, width=16, depth=3, heads=2, num_classes=5)
    return ModelConfig(PPFLOW2, **(small | sizes), students=parse(students))


def experiment_of(students=BLOCKS, **mesh):
    config = importlib.import_module("configs.digits_ppcl").get_config()
    config.model.update(dict(width=32, depth=3, heads=4, students=students))
    config.data.batch_size = 32
    config.mesh.update(mesh)
    return config


def test_cards_keep_them():
    card = Card(model_of(), Flow(), "pixels")
    assert Card.from_json(json.loads(json.dumps(card.to_json()))) == card
    plain = replace(card, model=replace(card.model, students=()))
    assert "students" not in plain.to_json()["model"]
    assert f"students: none -> {BOTH}" in plain.differences(card)


def test_leaves_have_pytorch_names_and_come_back_with_the_same_bits():
    model = model_of()
    params = jax.tree.map(np.asarray, random_params(model))
    state = to_torch(model, params)
    assert len(state) == len(key_table(model)) == len({k.torch for k in key_table(model)})
    assert {"students.0_0_1.attn.qkv.weight", "students.1_ffn0.weight"} <= state.keys()
    assert find_config(state, "ppflow", heads=2, latent_size=8) == model
    jax.tree.map(np.testing.assert_array_equal, load_state(model, state).params, params)


def test_flops_are_those_of_the_compiler():
    model = model_of(BLOCKS, width=128, latent_size=16)
    plain = replace(model, students=())
    ours = forward_flops(plain, 1) - forward_flops(model, 1)
    count = lambda m: xla_forward_flops(m, make_apply(m), 1, gradient=False)
    assert -0.07 < ours / (count(plain) - count(model)) - 1 < 0.01
    # a loop of one block is counted whole
    model = model_of("1:ffn0", width=128, latent_size=16, depth=1)
    plain = replace(model, students=())
    given = [jax.ShapeDtypeStruct((1, *n), jnp.float32) for n in (model.shape, ())]
    given.append(jax.ShapeDtypeStruct((1,), jnp.int32))

    def whole(m):
        work = compiled(m, programs=Programs())
        return work.lower(abstract_params(m), *given, 1).cost_analysis()["flops"]

    ours = forward_flops(plain, 1) - forward_flops(model, 1)
    assert -0.07 < ours / (whole(plain) - whole(model)) - 1 < 0.01


def test_rules_cover_every_large_leaf():
    sizes = SIZES["B"] | dict(latent_size=32, num_classes=1000)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model_of(**sizes)))
    total = sum(leaf.size for _, leaf in leaves)
    for path, leaf in leaves:
        known = any(re.search(pattern, leaf_path(path)) for pattern, _ in RULES)
        assert known or leaf.size < 0.01 * total, leaf_path(path)
    assert sum("students/" in leaf_path(path) for path, _ in leaves) > 10


@pytest.mark.parametrize("other", [{"adapters": "lora:rank=2,on=blocks/fc1"}, {"wrap": "switch"}])
def test_what_does_not_go_together_is_said(other):
    config = experiment_of()
    config.model.update(other)
    with pytest.raises(InputError, match=r"merge them first|do not stand in blocks with switch"):
        Experiment.from_config(config)
    with pytest.raises(InputError, match="stand for MLPs, the blocks have moe"):
        replace(model_of(), block=take_block({"ffn": "moe:experts=2,top_k=1"}))
    with pytest.raises(InputError, match="with students is not expanded"):
        expanded_config(replace(model_of("none"), pyramid=SIT, students=parse("0:0-1")), PPFLOW2)


@pytest.mark.parametrize("parts", [{"ffn": "moe:experts=2,top_k=1"}, {"mixer": "dico"}])
def test_they_stand_among_blocks_of_other_parts(parts):
    model = replace(model_of(BLOCKS), block=take_block(dict(parts)))
    params = jax.tree.map(lambda leaf: leaf / 2, random_params(model))
    x, t = jax.random.normal(jax.random.key(1), (2, *model.shape)), jnp.full(2, 0.4)
    apply = make_apply(model)
    both = [apply(params, x, t, jnp.arange(2), 0, on=on) for on in (None, ())]
    assert np.isfinite(both[0]).all() and np.abs(both[0] - both[1]).max() > 1e-4


@pytest.mark.long
def test_a_dry_run_finds_nothing_unexplained():
    config = experiment_of(data=2, fsdp=2, tensor=2)
    report = dry_run(config, Target("cpu:8", tuple(jax.devices()), None), sampler=False)
    (step,) = report.programs
    causes = report.causes(step)
    assert causes and not [c for c in causes if c[0].startswith("unexplained")], causes
    assert report.whole["params"] / report.parts["params"] > 1.5


@pytest.mark.long
@pytest.mark.parametrize("students", [BLOCKS, "0:0-1,1:ffn0"])
@pytest.mark.parametrize("goal", ["ppcl", "flow"])
def test_one_device_and_eight_agree(students, goal):
    config = experiment_of(students)
    if goal == "flow":  # the whole model with its students in place
        config.flow.objective, config.train.trainable = "flow", (".*",)
    experiment = Experiment.from_config(config)
    params, frozen = smaller(experiment.card.model), {}
    if goal == "ppcl":
        own = {"students": params.pop("students")}
        params, frozen = own, {"base": params}
    check_alike(*one_and_eight(experiment, params, frozen))


@pytest.mark.long
def test_a_killed_run_goes_on_with_the_same_bits_and_samples(tmp_path):
    """From a run without students; sampled with them; converted together with its base."""
    deep = "--config.model.depth=3"
    code, _, err = commands.train(tmp_path / "base", deep, "--config.train.steps=2")
    assert code == 0, err
    flags = [f"--config.init_from={tmp_path / 'base'}", "--config.train.steps=4"]
    flags += [deep, f"--config.model.students={BLOCKS}", "--config.flow.objective=ppcl"]
    trainable = "--config.train.trainable=('students/.*',)"
    code, _, err = commands.train(tmp_path / "wrong", *flags)
    assert code == 1 and "trains students alone" in err
    code, _, err = commands.train(tmp_path / "whole", *flags, trainable)
    assert code == 0, err
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
    code, out, err = commands.train(tmp_path / "killed", *flags, trainable)
    assert code == 0 and "continuing from step 2" in out, err
    whole, killed = (commands.weights(tmp_path / run) for run in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    for path, leaf in whole.items():
        assert leaf.tobytes() == killed[path].tobytes(), path
    model, base = (pf.load(tmp_path / run) for run in ("whole", "base"))
    jax.tree.map(np.testing.assert_array_equal, model.params["blocks"], base.params["blocks"])
    sampled = model.sample(2, plan=model.plan(steps=2))
    given = (f"--source={tmp_path / 'whole'}", f"--target={tmp_path / 'one'}")
    code, _, err = commands.run("convert", "--merge", *given)
    assert code == 0, err
    one = pf.load(tmp_path / "one")
    assert one.config.students == parse(BLOCKS)
    again = one.sample(2, plan=one.plan(steps=2))
    np.testing.assert_array_equal(again.latents, sampled.latents)
    code, _, err = commands.run(
        "sample", f"--checkpoint={tmp_path / 'one'}", "--out=x", "--explain", "--steps=4"
    )
    assert code == 0, err
    to = (f"--out={tmp_path / 'a.html'}", "--steps=2")
    code, _, err = commands.run("report.__main__", str(tmp_path / "whole"), *to)
    assert code == 0, err


def test_a_student_starts_as_the_block_in_the_middle():
    blocks = {"fc1": {"kernel": jnp.arange(6.0)}}
    found = fresh(parse("0:0-1,0:2-4,1:2-5"), blocks)["blocks"]["fc1"]["kernel"]
    assert found.tolist() == [0, 3, 3]
