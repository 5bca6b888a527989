"""Muon, and the schedules that are named."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppflow_jax.cost import dry_run, targets
from ppflow_jax.devices.sharding import leaf_path, make_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.adapters import parse
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import abstract_params
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.systems.registry import take_block, term
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.optimizer import OptimConfig, learning_rate, make_optimizer
from ppflow_jax.train.program import make_program
from ppflow_jax.train.resume import changes
from ppflow_jax.train.state import init_state
from tests.test_configs import load

MUON = OptimConfig(name="muon", lr=0.1, weight_decay=0.01)


def model(adapters="none", **parts):
    block = take_block(parts)
    return ModelConfig(
        PPFLOW2, latent_size=8, channels=1, width=16, depth=2, heads=2, num_classes=10,
        block=block, adapters=parse(adapters),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, {"fc1/kernel", "fc2/kernel"}),
        (
            {"ffn": "moe:experts=4,top_k=2"},
            {f"moe/{s}{n}" for s in ("", "shared/") for n in ("gate", "up", "down")},
        ),
        ({"wrap": "switch:experts=3,top_k=2"}, {"fc1/kernel", "fc2/kernel", "switch/w"}),
        ({"adapters": "lora:rank=2,on=.*;scale:on=blocks/.*"}, {"fc1/kernel", "fc2/kernel"}),
    ],
)
def test_muon_takes_the_matrices_of_the_blocks_and_nothing_else(parts, expected):
    config = model(**parts)
    objective = FlowObjective(PPFLOW2, Flow(), 10, terms=(term("repa:layer=1,dims=8"),))
    tx = make_optimizer(MUON, 9, config.block.matrices)
    make = lambda key: init_state(config, tx, key, objective)
    state = jax.eval_shape(make, jax.random.key(0))
    moments = lambda name: {
        leaf_path(path).split("/mu/")[1]
        for path, _ in jax.tree_util.tree_leaves_with_path(state["opt_state"])
        if f"/{name}/" in leaf_path(path) and "/mu/" in leaf_path(path)
    }
    always = {"attention/qkv_kernel", "attention/out/kernel"}
    assert moments("muon") == {f"blocks/{name}" for name in expected | always}
    every = {leaf_path(p) for p, _ in jax.tree_util.tree_leaves_with_path(state["params"])}
    assert moments("others") == every - moments("muon") and any("terms/" in n for n in every)


def orthogonal(matrix):
    """Five iterations of Newton and Schulz with the coefficients of Jordan, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (np.linalg.norm(matrix) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def test_every_layer_expert_and_projection_is_a_matrix_of_its_own():
    config = model(ffn="moe:experts=2,top_k=1")
    tx = make_optimizer(MUON, 9, config.block.matrices)
    keys = iter(jax.random.split(jax.random.key(0), 99))
    random = lambda leaf: jax.random.normal(next(keys), leaf.shape)
    params, grads = (jax.tree.map(random, abstract_params(config)) for _ in range(2))
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)

    def expected(gradient, weight):  # the first step of any momentum goes along the gradient
        size = 0.2 * np.sqrt(max(gradient.shape))
        return -0.1 * (size * orthogonal(np.float64(gradient)) + 0.01 * weight)

    at = lambda tree, *names: np.asarray(tree["blocks"][names[0]][names[1]])
    for layer in range(2):
        g, w, u = (at(t, "moe", "gate")[layer] for t in (grads, params, updates))
        for expert in range(2):
            np.testing.assert_allclose(u[expert], expected(g[expert], w[expert]), atol=2e-5)
        g, w, u = (at(t, "attention", "qkv_kernel")[layer] for t in (grads, params, updates))
        for which in range(3):
            one = expected(*(a[:, which].reshape(16, 16) for a in (g, w)))
            np.testing.assert_allclose(u[:, which].reshape(16, 16), one, atol=2e-5)
    adam = jax.tree.map(lambda u, w: u + 0.1 * 0.01 * w, updates["patchify"], params["patchify"])
    for leaf in jax.tree.leaves(
        adam
    ):  # AdamW's first step: the learning rate, whatever the gradient
        np.testing.assert_allclose(np.abs(leaf), 0.1, rtol=1e-3)


def test_off_the_optimizer_is_adamw():
    params = {"w": jnp.zeros((3, 2))}
    ours, plain = make_optimizer(OptimConfig(), 9), optax.adamw(1e-4, weight_decay=0.0)
    schedule = optax.adamw(optax.constant_schedule(1e-4), weight_decay=0.0)
    text = lambda tx: str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))
    assert text(ours) == text(schedule) != text(plain)


def test_the_moments_of_muon_lie_where_their_weights_do():
    config, _ = load("digits.py")
    config.optim.name = "muon"
    program = make_program(Experiment.from_config(config), make_mesh(2, 2, 2))
    places = {
        leaf_path(path): place
        for path, place in jax.tree_util.tree_leaves_with_path(program.shardings)
    }
    found = [name for name in places if "/muon/" in name and "/mu/" in name]
    assert len(found) == 4 and any(places[name].spec for name in found)
    for name in found:
        assert places[name] == places[f"params/{name.split('/mu/')[1]}"], name


def test_a_dry_run_knows_why_muon_talks():
    config, _ = load("digits.py:sit")
    config.update_from_flattened_dict({"model.width": 64, "model.depth": 2, "mesh.fsdp": 4})
    config.optim.name, config.data.batch_size = "muon", 32
    report = dry_run.dry_run(config, targets.Target.parse("cpu:8"), sampler=False)
    causes = {row[0] for row in report.causes(report.programs[0])}
    assert "matrices of Muon" in causes
    assert not [cause for cause in causes if cause.startswith("unexplained")], causes


def test_muon_without_a_matrix_is_refused():
    config, _ = load("digits.py:difffit")
    config.optim.name, config.init_from = "muon", "x"
    with pytest.raises(InputError, match="trainable has none of them"):
        Experiment.from_config(config)


@pytest.mark.parametrize(("schedule", "half"), [("wsd", 0.5), ("wsd_sqrt", 1 - np.sqrt(0.5))])
def test_wsd(schedule, half):
    config = OptimConfig(lr=1.0, warmup_steps=10, schedule=schedule, decay_share=0.4)
    rate = learning_rate(config, 100)
    found = [float(rate(s)) for s in (0, 5, 10, 59, 60, 80, 100)]
    assert found == pytest.approx([0, 0.5, 1, 1, 1, half, 0], abs=1e-6)
    without = learning_rate(OptimConfig(lr=1.0, schedule=schedule, decay_share=0.4), 100)
    assert [float(without(s)) for s in (0, 60, 80)] == pytest.approx([1, 1, half], abs=1e-6)
    with pytest.raises(InputError, match="do not fit 15 steps"):
        learning_rate(config, 15)


def test_a_longer_wsd_run_is_free_until_it_decays():
    def at(steps, share=0.2):
        return {"optim": {"schedule": "wsd", "decay_share": share}, "train": {"steps": steps}}

    free = lambda old, new, step: [c.free for c in changes(old, new, step)]
    assert free(at(100), at(200), 80) == [True] and free(at(100), at(200), 81) == [False]
    assert free(at(200), at(100), 100) == [True]  # it is over
    assert free(at(200), at(100), 90) == [False]  # it would have decayed already
    assert free(at(100), at(100, 0.3), 10) == [False]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "sgd"}, "unknown optimizer 'sgd': one of adamw, muon"),
        ({"schedule": "step"}, "constant, cosine, wsd, wsd_sqrt"),
        ({"decay_share": 0.0}, "decay_share 0.0"),
        ({"decay_share": float("nan")}, "decay_share nan"),
    ],
)
def test_what_is_no_optimizer(values, words):
    with pytest.raises(InputError, match=words):
        OptimConfig(**values)
