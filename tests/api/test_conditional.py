"""A model that must be told more than a class: library, command, and what refuses it."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from PIL import Image

import ppflow_jax as pf
from ppflow_jax.checkpoints.card import Card
from ppflow_jax.checkpoints.weights import save_weights
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.conditions import Channels, Scalar
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.serve.device import Device
from ppflow_jax.tune.asked import Asked
from ppflow_jax.tune.command import tune
from tests import commands
from tests.systems.checks import random_params

PLAIN = ModelConfig(PPFLOW2, 8, 1, width=16, depth=1, heads=2, num_classes=10)
MODEL = dataclasses.replace(PLAIN, conditions=(Channels("low", 1), Scalar("w", features=8)))
RNG = np.random.default_rng(0)
GIVEN = {
    "low": RNG.integers(0, 256, (5, 8, 8, 1)).astype(np.uint8).astype(np.float32) / 127.5 - 1,
    "w": np.float32([0, 1, 2, 3, 4]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional") / "weights"
    params = jax.tree.map(lambda leaf: np.asarray(0.4 * leaf), random_params(MODEL))
    save_weights(folder, Card(MODEL, Flow(), "pixels"), params)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return pf.load(folder)


def test_samples_are_as_many_as_conditions_and_follow_them(model):
    plan = model.plan(steps=2, cfg=2)
    five = model.sample(plan=plan, conditions=GIVEN)
    assert five.latents.shape == (5, 8, 8, 1) and five.labels.tolist() == [0, 1, 2, 3, 4]
    one = {"low": GIVEN["low"][2], "w": 2}
    alone = model.sample(3, plan=plan, conditions=one)
    np.testing.assert_allclose(alone.latents[2], five.latents[2], atol=2e-6)
    assert np.abs(alone.latents[1] - five.latents[1]).max() > 1e-3
    states = model.trajectory(plan=plan, conditions=GIVEN)
    np.testing.assert_allclose(states[-1], five.latents, atol=2e-6)


def test_velocity_and_likelihood_take_them(model):
    x = RNG.standard_normal((5, 8, 8, 1)).astype(np.float32)
    v = model.velocity(x, 0.3, 1, conditions=GIVEN)
    np.testing.assert_array_equal(v, model(x, 0.3, 1, conditions=GIVEN))
    assert np.abs(v - model.velocity(x, 0.3, 1, GIVEN | {"w": 0})).max() > 1e-3
    assert model.log_likelihood(x, 1, steps=2, conditions=GIVEN).shape == (5,)


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        (None, "conditions are low, w, given are none: give conditions={'low': array, 'w': array}"),
        ({"low": GIVEN["low"]}, "given are low:"),
        (GIVEN | {"high": 1}, "given are low, w, high:"),
        (GIVEN | {"low": GIVEN["low"][:, :4]}, r"shape \(5, 4, 8, 1\), the model takes \(n, 8, 8"),
        (GIVEN | {"w": "much"}, "condition w must be numbers"),
        (GIVEN | {"w": np.nan}, "condition w has values that are NaN"),
        (GIVEN | {"w": [1, 2]}, "condition w has values of 2 images, asked for are 5"),
    ],
)
def test_wrong_conditions_are_refused(model, conditions, words):
    with pytest.raises(pf.InputError, match=words):
        model.sample(5, conditions=conditions)


def test_a_weaker_model_must_have_them_too(model, tmp_path):
    params = jax.tree.map(np.asarray, random_params(PLAIN))
    save_weights(tmp_path / "weak", Card(PLAIN, Flow(), "pixels"), params)
    with pytest.raises(pf.InputError, match="has other conditions than the model"):
        model.plan(steps=2, cfg=2, weak=pf.load(tmp_path / "weak"))


def sampled(folder, out, *more):
    flags = (f"--checkpoint={folder}", f"--out={out}", "--steps=2", "--cfg=2", "--save_latents")
    return commands.run("sample", *flags, *more)


def test_the_command_reads_them_from_files_and_folders(folder, model, tmp_path):
    np.savez(tmp_path / "told.npz", **GIVEN, other=np.zeros(2))
    (tmp_path / "told" / "low").mkdir(parents=True)
    np.save(tmp_path / "told" / "w.npy", GIVEN["w"])
    for k, picture in enumerate(np.round(127.5 * (GIVEN["low"] + 1)).astype(np.uint8)):
        Image.fromarray(picture[..., 0]).save(tmp_path / "told" / "low" / f"{k}.png")
    expected = model.sample(plan=model.plan(steps=2, cfg=2), conditions=GIVEN).latents
    for name in ("told.npz", "told"):
        code, _, err = sampled(folder, tmp_path / f"out_{name}", f"--conditions={tmp_path / name}")
        assert code == 0, err
        found = np.load(tmp_path / f"out_{name}" / "latents.npy")
        np.testing.assert_array_equal(found, expected)
    np.savez(tmp_path / "other.npz", **GIVEN | {"w": GIVEN["w"] + 1})
    out, file = tmp_path / "out_told.npz", tmp_path / "other.npz"
    code, _, err = sampled(folder, out, f"--conditions={file}")
    assert code != 0 and "conditions_sha256" in err


def test_requests_take_the_condition_of_their_line(folder, model, tmp_path):
    lines = [{"label": 1, "seed": 3}, {"label": 4, "seed": 3}]
    (tmp_path / "lines").write_text("\n".join(map(str, lines)).replace("'", '"'))
    two = {name: values[:2] for name, values in GIVEN.items()}
    np.savez(tmp_path / "told.npz", **two)
    flags = (f"--requests={tmp_path / 'lines'}", f"--conditions={tmp_path / 'told.npz'}")
    code, _, err = sampled(folder, tmp_path / "out", *flags)
    assert code == 0, err
    found = np.load(tmp_path / "out" / "latents.npy")
    plan, second = model.plan(steps=2, cfg=2), {k: v[1] for k, v in two.items()}
    alone = model.sample(1, plan=plan, labels=4, seed=3, conditions=second).latents
    np.testing.assert_allclose(found[1], alone[0], atol=1e-4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (None, "model's conditions are low, w: give --conditions=FILE.npz"),
        (lambda path: None, "does not exist"),
        (lambda path: path.write_bytes(b"no zip"), "cannot read --conditions="),
        (lambda path: np.savez(path.open("wb"), low=GIVEN["low"]), "has low, .* add w"),
        (lambda path: path.mkdir(), "has neither low.npy nor a folder low"),
    ],
)
def test_wrong_files_are_refused(folder, tmp_path, make, words):
    if make:
        make(tmp_path / "told")
    flags = [f"--conditions={tmp_path / 'told'}"] if make else []
    code, _, err = sampled(folder, tmp_path / "out", "--num=2", *flags)
    assert code != 0 and not (tmp_path / "out").exists()
    assert len(err.strip().splitlines()) == 1 and re.search(words, err), err


def test_who_cannot_tell_refuses(folder, model, tmp_path):
    for what, call in {
        "the service": lambda: Device(model, "none", 4),
        "tune": lambda: tune(model, Asked(out=str(tmp_path / "plan.json"), evaluations=4)),
    }.items():
        with pytest.raises(pf.InputError, match=f"are low, w, and {what} has no values for them"):
            call()
    code, _, err = commands.run(
        "evaluate", f"--checkpoint={folder}", "--reference=digits", "--features=digits", "--num=4"
    )
    assert code != 0 and "has no values for them" in err
