"""What every term of the loss passes, whatever paper it is from."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import digits
from ppflow_jax.cost.dry_run import dry_run
from ppflow_jax.cost.targets import Target
from ppflow_jax.devices.sharding import RULES, leaf_path, make_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.models.config import SIZES
from ppflow_jax.models.network import make_apply
from ppflow_jax.systems.registry import TERMS, term
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.program import make_program
from tests.systems.checks import random_params

# Of a model with two blocks and two heads: text, and shapes of what it reads of an example
CASES = {
    "repa": ("repa:layer=1,dims=6,hidden=16", {"teacher": (4, 4, 6)}),
    "haste": ("haste:layers=0/1,teacher=1/0", {"teacher_attention": (2, 2, 4, 4)}),
    "multires": ("multires:factors=2/4", {}),
}
SHAPES = {name: shape for _, fields in CASES.values() for name, shape in fields.items()}
BATCH = 32
each = pytest.mark.parametrize("name", CASES)


def config_of(names, **mesh):
    config = digits.get_config()
    config.model.update(dict(width=32, depth=2, heads=2))
    config.data.batch_size = BATCH
    config.mesh.update(mesh)
    if names:
        config.data.fields = tuple(f for name in names for f in CASES[name][1])
        config.flow.terms = tuple(CASES[name][0] for name in names)
        config.train.phases = ((3, dict.fromkeys(names, 0.5)), (6, {}))
    return config


def batch_of(model, fields):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=(BATCH, *shape)).astype("f4")
    batch = {"x": draw(*model.shape), "label": np.arange(BATCH, dtype="i4") % 10}
    batch |= {name: draw(*SHAPES[name]).astype("f2") for name in fields}
    return jax.tree.map(jnp.asarray, batch)


def test_every_kind_is_here():
    assert TERMS.keys() == CASES.keys()
    assert all(TERMS[name].name == name for name in TERMS)


@each
def test_the_text_says_all_of_it_and_runs_keep_it(name):
    text, fields = CASES[name]
    made = term(text)
    assert made.name == name and set(made.fields) == set(fields)
    assert made != term(name) and hash(made) == hash(term(text))
    experiment = Experiment.from_config(config_of([name]))
    kept = json.loads(json.dumps(experiment.card.to_json()))["experiment"]
    assert kept["flow"]["terms"] == [text] and kept["data"]["fields"] == list(fields)


@each
def test_wrong_settings_are_refused(name):
    with pytest.raises(InputError, match="unknown key 'nothing'"):
        term(f"{name}:nothing=3")
    if not CASES[name][1]:
        return
    config = config_of([name])
    config.data.fields = ()
    with pytest.raises(InputError, match=f"{name} reads the field .* has none: add it there"):
        Experiment.from_config(config)


@each
def test_without_a_weight_the_loss_is_textually_what_it_is_without_the_term(name):
    texts = []
    for names in ([], [name]):
        experiment = Experiment.from_config(config_of(names))
        objective, model = experiment.objective, experiment.card.model
        batch = batch_of(model, ())

        def loss(params, objective=objective, batch=batch, model=model):
            draws = objective.draw(jax.random.key(0), batch)
            return objective.loss(make_apply(model), params, {}, batch, draws, {})

        texts.append(str(jax.make_jaxpr(loss)(random_params(model))))
    assert re.sub("0x[0-9a-f]+", "", texts[0]) == re.sub("0x[0-9a-f]+", "", texts[1])


@each
def test_rules_cover_every_large_leaf(name):
    config = config_of([name])
    config.model.update(SIZES["B"])
    leaves = jax.tree_util.tree_leaves_with_path(
        make_program(Experiment.from_config(config), make_mesh()).abstract["params"]
    )
    total = sum(leaf.size for _, leaf in leaves)
    for path, leaf in leaves:
        known = any(re.search(pattern, f"params/{leaf_path(path)}") for pattern, _ in RULES)
        assert known or leaf.size < 0.01 * total, leaf_path(path)


@pytest.mark.long
def test_a_dry_run_finds_nothing_unexplained(tmp_path):
    config = config_of(list(CASES), data=2, fsdp=2, tensor=2)
    model = Experiment.from_config(config).card.model
    arrays = batch_of(model, config.data.fields)
    for name, file in {"x": "latents", "label": "labels"}.items():
        arrays[file] = arrays.pop(name)
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    config.data.update(dict(source="arrays", path=str(tmp_path)))
    report = dry_run(config, Target("cpu:8", tuple(jax.devices()), None), sampler=False)
    (step,) = report.programs
    causes = report.causes(step)
    assert causes and not [c for c in causes if c[0].startswith("unexplained")], causes


@pytest.mark.long
def test_one_device_and_eight_agree():
    experiment = Experiment.from_config(config_of(list(CASES)))
    model, key, found = experiment.card.model, jax.random.key(0), []
    batch = batch_of(model, experiment.config.data.fields)
    for sizes in ((1, 1, 1), (2, 2, 2)):
        devices = jax.devices()[: int(np.prod(sizes))]
        program = make_program(experiment, make_mesh(*sizes, devices=devices))
        start = jax.tree.map(jnp.zeros_like, program.init(key))
        own = program.init(key)["params"]["terms"]
        start |= {"params": random_params(model) | {"terms": own}}
        state = jax.device_put(start, program.shardings)
        state, metrics = program.step(0)(state, batch, key, {})
        gradients = optax.tree.get(state["opt_state"], "mu")  # a tenth of them
        found.append(({k: float(v) for k, v in metrics.items()}, jax.device_get(gradients)))
    (one, gradients), (eight, others) = found
    assert CASES.keys() <= one.keys() and one == pytest.approx(eight, rel=5e-5)
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    for (path, a), b in zip(leaves, jax.tree.leaves(others)):
        assert np.abs(a).max() > 0, leaf_path(path)
        assert np.abs(a - b).max() < 1e-3 * np.abs(a).max(), leaf_path(path)
