"""What every part of a block passes, whatever paper it is from."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from dataclasses import fields, replace

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
from ppflow_jax.devices.sharding import RULES, leaf_path, make_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.network import abstract_params, make_apply
from ppflow_jax.models.parts import DIT, BlockSpec
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.systems.registry import KINDS, part, take_block
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.init_from import open_start
from tests import commands
from tests.meshes import check_alike, one_and_eight
from tests.systems.checks import compiled, random_params

# Settings of `config.model` by name: each is a part with its own leaves
PARTS = {
    "moe": {"ffn": "moe:experts=4"},
    "moe of MLPs": {"ffn": "moe:experts=3,top_k=2,shared=0,renormalise=true,expert=gelu"},
    "dense2moe": {"ffn": "dense2moe:experts=6,top_k=2"},
    "switch": {"wrap": "switch:experts=3,top_k=2"},
    "dydit": {"wrap": "dydit"},
    "mob": {"wrap": "mob:group=2,kept=1"},
    "clear": {"mixer": "clear:radius=2"},
    "clear with cells": {"mixer": "clear:radius=2,pool=2"},
    "linfusion": {"mixer": "linfusion:hidden=24"},
    "dico": {"mixer": "dico"},
    "rope": {"mixer": "rope:qk_norm=rms"},
    "swiglu": {"ffn": "swiglu"},
    "tdln": {"norm": "tdln"},
    "tdln of root mean squares": {"norm": "tdln:rms=true"},
}
# What takes long is done once, with all kinds together
TOGETHER = PARTS["moe"] | PARTS["switch"]
ROUTED = PARTS["dydit"] | {"ffn": "mlp"}
# Beside those of TOGETHER, or in their place
ON_A_MESH = [
    PARTS["clear with cells"],
    PARTS["linfusion"],
    PARTS["dico"] | PARTS["tdln"],
    PARTS["rope"],
    ROUTED,
    PARTS["dense2moe"] | PARTS["mob"],
]
FROM_PLAIN = PARTS["moe of MLPs"] | PARTS["switch"]  # starts as the model that it is made from
FROM_PLAIN |= {"mixer": "clear:radius=9"}  # which covers the grid
EVERYTHING_ACTIVE = {
    "moe": "moe:experts=2,top_k=2",
    "moe of MLPs": "moe:top_k=8,expert=gelu",
    "dense2moe": "dense2moe:top_k=12",
    "swiglu": "swiglu",
}
each = pytest.mark.parametrize("name", PARTS)


def model_of(name, **sizes):
    block = take_block(dict(PARTS[name]))
    small = dict(latent_size=8, channels=4, width=16, depth=2, heads=2, num_classes=5)
    return ModelConfig(PPFLOW2, **(small | sizes), block=block)


def experiment_of(parts, **mesh):
    config = importlib.import_module("configs.digits").get_config()
    config.model.update(dict(width=32, depth=2, heads=4) | TOGETHER | parts)
    config.data.batch_size = 32
    if parts == ROUTED:
        config.flow.objective = "dydit:share=0.5,warmup=4"
    config.mesh.update(mesh)
    return config


def test_every_kind_is_here():
    used = {BlockSpec(**{f: part(t, f)}) for p in PARTS.values() for f, t in p.items()} | {DIT}
    kinds = {p.kind for spec in used for p in spec.parts}
    assert kinds >= {kind for known in KINDS.values() for kind in known}


@each
def test_cards_keep_it(name):
    model = model_of(name)
    card = Card(model, Flow(), "pixels")
    assert Card.from_json(json.loads(json.dumps(card.to_json()))) == card
    plain = replace(card, model=replace(model, block=DIT))
    assert not PARTS[name].keys() & plain.to_json()["model"].keys()
    assert all(f"{field}: none -> " in plain.differences(card) for field in PARTS[name])


@pytest.mark.parametrize("field", KINDS)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing", "unknown .* 'nothing': one of "),
        ("{kind}:sizes=3", "unknown key 'sizes'"),
        ("{kind}:{key}=a", "{key} is {type}, got 'a'"),
    ],
)
def test_wrong_settings_are_refused(field, text, words):
    kind = next(k for k in KINDS[field] if k not in ("mlp", "none"))
    first = fields(KINDS[field][kind])[0]
    names = dict(kind=kind, key=first.name, type=first.type)
    with pytest.raises(InputError, match=words.format(**names)):
        part(text.format(**names), field)


@each
def test_leaves_have_pytorch_names_and_come_back_with_the_same_bits(name):
    model = model_of(name)
    params = jax.tree.map(np.asarray, random_params(model))
    state = to_torch(model, params)
    assert len(state) == len(key_table(model))
    said = {field: PARTS[name].get(field) for field in ("ffn", "mixer")}
    assert find_config(state, "ppflow", heads=2, latent_size=8, **said) == model
    back = load_state(model, state).params
    jax.tree.map(np.testing.assert_array_equal, back, params)


@each
def test_flops_are_those_of_the_compiler(name):
    # The compiler counts experts that are not used, too
    block = take_block(PARTS[name] | {"ffn": EVERYTHING_ACTIVE.get(name, "mlp")})
    model = replace(model_of(name, width=128, latent_size=16), block=block)
    apply = make_apply(model, programs=Programs(experts="dense"))
    count = lambda m, apply: xla_forward_flops(m, apply, 1, gradient=False)
    # In the place of another part, not beside it; routers are fewer than what is element by element
    instead = ("swiglu", "dydit", "dense2moe", "mob")
    if {"mixer", "norm"} & PARTS[name].keys() or name in instead:
        assert -0.07 < forward_flops(model, 1) / count(model, apply) - 1 < 0.01
        return
    ours = forward_flops(model, 1) - forward_flops(replace(model, block=DIT), 1)
    plain = make_apply(replace(model, block=DIT))
    theirs = count(model, apply) - count(replace(model, block=DIT), plain)
    assert -0.07 < ours / theirs - 1 < 0.01  # it also counts what is done element by element


@each
def test_rules_cover_every_large_leaf(name):
    sizes = SIZES["B"] | dict(latent_size=32, num_classes=1000)
    model = model_of(name, **sizes)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model))
    total = sum(leaf.size for _, leaf in leaves)
    rules = (*RULES, *model.block.rules)
    for path, leaf in leaves:
        known = any(re.search(pattern, leaf_path(path)) for pattern, _ in rules)
        assert known or leaf.size < 0.01 * total, leaf_path(path)
    for pattern, _ in model.block.rules:
        assert any(re.search(pattern, leaf_path(path)) for path, _ in leaves) or "moe" in pattern


@pytest.mark.long
@pytest.mark.parametrize("parts", ON_A_MESH)
def test_a_dry_run_finds_nothing_unexplained(parts):
    config = experiment_of(parts, data=2, fsdp=2, tensor=2)
    report = dry_run(config, Target("cpu:8", tuple(jax.devices()), None), sampler=False)
    (step,) = report.programs
    causes = report.causes(step)
    assert causes and not [c for c in causes if c[0].startswith("unexplained")], causes
    assert report.whole["params"] / report.parts["params"] > 1.5


@pytest.mark.long
@pytest.mark.parametrize("parts", ON_A_MESH)
def test_one_device_and_eight_agree(parts):
    check_alike(*one_and_eight(Experiment.from_config(experiment_of(parts))))


def test_they_start_from_a_plain_run_and_compute_the_same(small_run):
    source = pf.load(small_run)
    model = replace(source.config, block=take_block(dict(FROM_PLAIN)))
    card = replace(source.card, model=model)
    _, start = open_start(str(small_run), card, make_mesh())
    params = random_params(source.config)  # the gates of a run so short are all but closed
    grown = jax.jit(start)(params, jax.random.key(0))
    assert jax.tree.map(jnp.shape, grown) == jax.tree.map(lambda s: s.shape, abstract_params(model))
    x, t = jax.random.normal(jax.random.key(1), (4, *model.shape)), jnp.full(4, 0.4)
    for stage in range(2):
        plain, ours = (
            compiled(m)(p, x, t, jnp.arange(4), stage)
            for m, p in ((source.config, params), (model, grown))
        )
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_a_killed_run_goes_on_with_the_same_bits_and_samples(tmp_path, small_run):
    """The commands of docs/moe.md and docs/switch.md that start from a run."""
    flags = [f"--config.model.{field}={text}" for field, text in FROM_PLAIN.items()]
    flags.append(f"--config.init_from={small_run}")
    code, out, err = commands.train(tmp_path / "whole", *flags, "--config.train.steps=4")
    assert code == 0, err
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
    code, out, err = commands.train(tmp_path / "killed", *flags, "--config.train.steps=4")
    assert code == 0 and "continuing from step 2" in out, err
    whole, killed = (commands.weights(tmp_path / run) for run in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    for path, leaf in whole.items():
        assert leaf.tobytes() == killed[path].tobytes(), path
    model = pf.load(tmp_path / "whole")
    assert model.config.block == take_block(dict(FROM_PLAIN))
    assert model.sample(2, plan=model.plan(steps=2)).latents.shape == (2, 8, 8, 1)
