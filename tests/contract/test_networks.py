"""What every network in the place of PPFlow's passes, from configuration to samples."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppflow_jax as pf
from ppflow_jax.checkpoints.card import Card
from ppflow_jax.convert.infer import find_config, find_kind
from ppflow_jax.convert.keys import key_table, position_names, position_values, to_torch
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
from ppflow_jax.pyramid import PPFLOW2, SIT, Pyramid
from ppflow_jax.systems.registry import NETWORKS, take_block, take_network
from ppflow_jax.train.experiment import Experiment
from tests import commands
from tests.meshes import check_alike, one_and_eight
from tests.systems.checks import compiled, random_params

# Settings of `config.model` by name
KINDS: dict[str, dict[str, Any]] = {
    "ddt": {
        "network": "ddt:width=64,depth=2,heads=4",
        "mixer": "rope:qk_norm=rms",
        "ffn": "swiglu",
    },
    "ddt of MLPs": {
        "network": "ddt:width=64,depth=1,heads=2,rms=false",
        "mixer": "rope:qk_norm=layer",
        "ffn": "mlp",
    },
    "dico": {
        "network": "dico:depths=1/1/1/1/1",
        "pyramid": "2x2@0.5,1x1@1",
        "width": 8,
        "depth": 5,
        "heads": 1,
    },
}
# As large as their papers have them
PUBLIC = {
    "ddt": SIZES["XL"] | {"network": "ddt", "latent_size": 16, "channels": 768},
    "dico": {
        "network": "dico:depths=9/9/10/9/9",
        "width": 416,
        "depth": 46,
        "latent_size": 32,
    },
}
each = pytest.mark.parametrize("name", KINDS)


def made(settings, **sizes):
    small = dict(latent_size=8, channels=4, width=16, depth=2, heads=2, num_classes=5)
    values = small | {"pyramid": str(PPFLOW2)} | settings | sizes
    network, block = take_network(values), take_block(values)
    pyramid = Pyramid.parse(values.pop("pyramid"))
    return ModelConfig(pyramid, **values, block=block, network=network)


def experiment_of(name, **mesh):
    config = importlib.import_module("configs.digits").get_config()
    config.model.update(dict(width=32, depth=2, heads=4) | KINDS[name])
    config.data.batch_size = 32
    config.mesh.update(mesh)
    return config


def test_every_network_is_here():
    assert {text["network"].partition(":")[0] for text in KINDS.values()} == NETWORKS.keys()


@each
def test_cards_keep_it(name):
    model = made(KINDS[name])
    card = Card(model, Flow(), "pixels")
    assert Card.from_json(json.loads(json.dumps(card.to_json()))) == card
    plain = replace(card, model=replace(model, network=None))
    assert "network" not in plain.to_json()["model"]
    assert "network: none -> " in plain.differences(card)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing", "unknown network 'nothing': one of "),
        ("ddt:sizes=3", "unknown key 'sizes'"),
        ("ddt:width=a", "width is int, got 'a'"),
        ("dico:depths=2/a", "depths is tuple"),
    ],
)
def test_wrong_settings_are_refused(text, words):
    with pytest.raises(InputError, match=words):
        take_network({"network": text})


@pytest.mark.parametrize(
    ("name", "pyramid"),
    [(name, p) for name in ("ddt", "ddt of MLPs") for p in (SIT, PPFLOW2)]
    + [("dico", Pyramid.parse("1x1@1"))],
    ids=str,
)
def test_leaves_have_pytorch_names_and_come_back_with_the_same_bits(name, pyramid):
    model = made(KINDS[name], pyramid=str(pyramid))
    params = jax.tree.map(np.asarray, random_params(model))
    tables = {n: position_values(model, i) for i, n in enumerate(position_names(model))}
    state = to_torch(model, params) | tables
    assert len(state) == len(key_table(model)) + len(tables)
    kind = find_kind(state)
    said = model.network if name != "ddt" else None  # one block of the head is not the public two
    size = None if tables else model.latent_size
    found = find_config(state, kind, network=said and str(said), latent_size=size)
    assert found == model
    back = load_state(model, state)
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    assert not back.positions
    for table in tables:
        with pytest.raises(InputError, match=rf"{re.escape(table)}: differs by"):
            load_state(model, state | {table: state[table] + 0.1})
    first, tensor = next(iter(state.items()))
    lacking = {n: v for n, v in state.items() if n != first}
    with pytest.raises(InputError, match=rf"{re.escape(first)}: missing; nothing was written"):
        load_state(model, lacking)
    with pytest.raises(InputError, match="extra: not expected"):
        load_state(model, state | {"extra": tensor})


@pytest.mark.parametrize("name", ["ddt", "ddt of MLPs"])  # of convolutions: test_dico_network.py
@pytest.mark.parametrize("stage", [0, 1])
def test_flops_are_those_of_the_compiler(name, stage):
    text = KINDS[name] | {"network": KINDS[name]["network"].replace("width=64", "width=192")}
    model = made(text, width=128, latent_size=16, heads=4)
    apply = make_apply(model, programs=Programs(unrolled=True))
    theirs = xla_forward_flops(model, apply, stage, gradient=False)
    assert -0.07 < forward_flops(model, stage) / theirs - 1 < 0.01


@pytest.mark.parametrize("name", PUBLIC)
def test_rules_cover_every_large_leaf(name):
    model = made(KINDS[name] | PUBLIC[name], pyramid="1x1@1", num_classes=1000)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model))
    total = sum(leaf.size for _, leaf in leaves)
    rules = (*RULES, *model.rules)
    for path, leaf in leaves:
        known = any(re.search(pattern, leaf_path(path)) for pattern, _ in rules)
        assert known or leaf.size < 0.01 * total, leaf_path(path)
    for pattern, _ in model.network.rules:
        assert any(re.search(pattern, leaf_path(path)) for path, _ in leaves), pattern


@each
def test_unrolled_scanned_and_both_stages_at_once_agree(name):
    model = made(KINDS[name])
    params, key = random_params(model), jax.random.key(0)
    xs = tuple(jax.random.normal(jax.random.fold_in(key, i), (2, *model.shape)) for i in range(2))
    ts, ys = (jnp.array([0.1, 0.4]), jnp.array([0.6, 0.9])), (jnp.array([0, 1]), jnp.array([4, 5]))
    scanned = compiled(model, programs=Programs())
    unrolled = compiled(model, programs=Programs(unrolled=True))
    alone = [scanned(params, *each) for each in zip(xs, ts, ys, (0, 1))]
    both = unrolled(params, xs, ts, ys, (0, 1))
    for a, b in zip(alone, both):
        assert np.abs(a).max() > 0.1
        np.testing.assert_allclose(a, b.prediction, atol=2e-5 * np.abs(a).max())


@pytest.mark.long
@each
def test_a_dry_run_finds_nothing_unexplained(name):
    config = experiment_of(name, data=2, fsdp=2, tensor=2)
    report = dry_run(config, Target("cpu:8", tuple(jax.devices()), None))
    for program in report.programs:
        causes = report.causes(program)
        assert not [c for c in causes if c[0].startswith("unexplained")], causes
    assert report.whole["params"] / report.parts["params"] > 1.5


@pytest.mark.long
@each
def test_one_device_and_eight_agree(name):
    experiment = Experiment.from_config(experiment_of(name))
    check_alike(*one_and_eight(experiment), zero=experiment.card.model.network.fixed)


@pytest.mark.long
def test_a_killed_run_goes_on_with_the_same_bits_and_samples(tmp_path):
    settings = KINDS["ddt"] | dict(width=16, depth=1, heads=2)
    flags = [f"--config.model.{field}={text}" for field, text in settings.items()]
    flags += ["--config.optim.weight_decay=0.1", "--config.train.steps=4"]
    code, _, err = commands.train(tmp_path / "whole", *flags)
    assert code == 0, err
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
    code, out, err = commands.train(tmp_path / "killed", *flags)
    assert code == 0 and "continuing from step 2" in out, err
    whole, killed = (commands.weights(tmp_path / run) for run in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    for path, leaf in whole.items():
        assert leaf.tobytes() == killed[path].tobytes(), path
    model = pf.load(tmp_path / "whole")
    assert str(model.config.network) == "ddt:width=64,depth=2,heads=4,rms=true"
    assert model.sample(2, plan=model.plan(steps=2)).latents.shape == (2, 8, 8, 1)
