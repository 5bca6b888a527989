"""Feature probes: heads, pools, the sweep, and the command."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import ppflow_jax as pf
from ppflow_jax.data.sources import ArraySource
from ppflow_jax.errors import InputError
from ppflow_jax.evaluate.probing import Examples, Sweep, features_at, probe, read_examples
from ppflow_jax.flow.sampler import image_noise
from ppflow_jax.metrics import probe_heads
from ppflow_jax.metrics.probe_heads import linear, ridge
from ppflow_jax.models.stack import Taps
from tests.commands import run
from tests.systems.checks import random_params, within
from tests.systems_parity import SYSTEMS, Reference

REFERENCE = Path(__file__).parent / "reference" / "systems" / "ddae" / "ddae.npz"
RNG = np.random.default_rng(0)


def test_the_classifier_is_the_authors():
    rows = list(SYSTEMS["ddae"](Reference(REFERENCE)))
    assert len(rows) == 5
    within(rows)


def blobs(count, classes=3, width=6, seed=0):
    """Classes that a linear function tells apart, on features of odd scales."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    centres = 8 * np.random.default_rng(9).normal(size=(classes, width))
    scale = np.array([1e-3, 1, 1e3, 1, 1, 1])[:width]
    return np.float32((centres[labels] + rng.normal(size=(count, width))) * scale + 5), labels


@pytest.mark.parametrize("fit", [ridge, linear])
def test_what_is_linearly_separable_is_told_apart_and_noise_is_not(fit):
    train, test = blobs(1500), blobs(200, seed=1)
    if fit is linear:  # for Adam features are of the order of 1
        mean, scale = train[0].mean(axis=0), train[0].std(axis=0) / 3
        train, test = (((x - mean) / scale, y) for x, y in (train, test))
    assert fit(*train, 3).accuracy(*test) > 0.98
    noise, labels = RNG.normal(size=(2000, 6)), RNG.integers(0, 3, 2000)
    assert (
        abs(fit(noise[:1500], labels[:1500], 3).accuracy(noise[1500:], labels[1500:]) - 1 / 3) < 0.1
    )


def test_ridge_is_the_least_squares_solution_with_a_penalty():
    x, y = blobs(40)
    x = np.concatenate([x, np.full((40, 1), 7.0, np.float32)], axis=1)  # one says nothing
    head = ridge(x, y, 3)
    z = np.float64(x) - np.float64(x).mean(0)
    z[:, :-1] /= np.float64(x).std(0)[:-1]
    rows = np.concatenate([z, np.sqrt(40 * probe_heads.RIDGE) * np.eye(7)])
    targets = np.concatenate([np.eye(3)[y] - np.eye(3)[y].mean(0), np.zeros((7, 3))])
    solution = np.linalg.lstsq(rows, targets, rcond=None)[0]
    np.testing.assert_allclose(head.logits(x), z @ solution + np.eye(3)[y].mean(0), atol=1e-8)


def test_classes_of_which_there_are_no_examples_are_never_chosen():
    x, y = blobs(60)
    assert set(ridge(x, y, 5).logits(x).argmax(-1)) <= {0, 1, 2}


def test_linear_heads_depend_on_their_seed_alone():
    x, y = blobs(50)
    one, again, other = (linear(x, y, 3, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.weight, again.weight)
    assert (one.weight != other.weight).any()


@pytest.fixture(scope="module")
def model(small_run):
    found = pf.load(small_run)
    weights = replace(found.weights, load=lambda: random_params(found.config))
    return pf.Model(weights)


@pytest.fixture(scope="module")
def examples():
    """Of which the brightness tells the class."""
    labels = np.arange(60) % 3
    x = labels[:, None, None, None] - 1 + 0.1 * RNG.normal(size=(60, 8, 8, 1))
    return Examples(np.float32(x), labels, 7 * np.arange(60))


SWEEP = Sweep((1,), (0.2, 0.9), ("mean", "1x2"))


@pytest.mark.parametrize("t", SWEEP.times)
def test_features_are_means_over_the_tokens_of_the_stage_of_that_time(model, examples, t):
    config, stage = model.config, int(t > 0.5)
    noise, _ = image_noise(np.uint32(3), examples.ids, config.shape)
    xt = t * examples.x + (1 - t) * np.asarray(noise)
    y = jnp.full(60, config.null_label)
    given = ((jnp.float32(xt),), (jnp.full(60, t),), (y,), (stage,))
    with jax.default_matmul_precision("highest"):
        tapped = jax.jit(
            lambda p, x, s, y: model.network(p, x, s, y, (stage,), taps=Taps(h=(1,)))[0].taps
        )(model.params, *given[:3])
    rows, columns = config.pyramid.grid(stage, 8)
    tokens = np.asarray(tapped["h/1"]).reshape(60, rows, columns, -1)
    for batch in (64, 16):
        found = features_at(model, examples, SWEEP, t, batch=batch, seed=3)
        np.testing.assert_allclose(found[1, "mean"], tokens.mean((1, 2)), rtol=1e-4, atol=1e-4)
        halves = tokens.reshape(60, rows, 2, columns // 2, -1).mean((1, 3)).reshape(60, -1)
        np.testing.assert_allclose(found[1, "1x2"], halves, rtol=1e-4, atol=1e-4)


def test_the_sweep_judges_on_examples_that_no_head_saw(model, examples):
    """What NumPy finds with the same features; every fifth example is held out."""
    rows = probe(model, examples, SWEEP, seed=3)
    assert [(r["time"], r["stage"], r["pool"]) for r in rows] == [
        *((0.2, 0, pool) for pool in SWEEP.pools),
        *((0.9, 1, pool) for pool in SWEEP.pools),
    ]
    held = np.arange(60) % 5 == 4
    for row in rows:
        features = features_at(model, examples, SWEEP, row["time"], batch=64, seed=3)
        x = np.float64(features[row["block"], row["pool"]])
        z = (x - x[~held].mean(0)) / x[~held].std(0)
        y = np.eye(10)[examples.labels[~held]]
        gram = z[~held].T @ z[~held] + 0.01 * 48 * np.eye(z.shape[1])
        scores = z @ np.linalg.solve(gram, z[~held].T @ (y - y.mean(0))) + y.mean(0)
        right = scores.argmax(-1) == examples.labels
        assert row["accuracy"] == pytest.approx(right[held].mean())
        assert row["train_accuracy"] == pytest.approx(right[~held].mean())
    assert rows[-1]["accuracy"] > 0.9


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (Sweep((2,), (0.5,)), "blocks 1 to 1"),
        (Sweep((0,), (0.5,)), "blocks 1 to 1"),
        (Sweep((1,), (1.5,)), r"from 0 \(noise\) to 1"),
        (Sweep((1,), (0.5,), ("max",)), "mean, or RxC"),
        (Sweep((1,), (0.9, 0.2), ("3x3",)), "stage 0 has 2x2 tokens"),
        (Sweep((1,), (0.5,), heads=("mlp",)), "ridge, linear"),
        (Sweep((), (0.5,)), "at least one"),
    ],
)
def test_what_the_model_does_not_have_is_refused(model, sweep, words):
    with pytest.raises(InputError, match=words):
        sweep.check(model.config)


def test_examples_are_spread_over_the_dataset():
    x = np.arange(100, dtype="f4")[:, None, None, None] * np.ones((1, 4, 4, 1), "f4")
    found = read_examples(ArraySource("some", x, np.arange(100)), None, 25, 8, 0)
    assert found.ids[0] == 0 and found.ids[-1] == 99 and len(found) == 25
    np.testing.assert_array_equal(found.x[:, 0, 0, 0], found.ids)
    np.testing.assert_array_equal(found.labels, found.ids)
    assert found.held_out.sum() == 5
    with pytest.raises(InputError, match="at least 10 examples"):
        read_examples(ArraySource("few", x[:9], np.arange(9)), None, 25, 8, 0)


def test_the_command_writes_a_table_a_json_file_and_a_picture(small_run, tmp_path):
    """That of docs/probe.md."""
    out = tmp_path / "probe.json"
    given = [f"--checkpoint={small_run}", f"--out={out}", "--num=200", "--times=0.3,0.8"]
    code, text, err = run("evaluate.probe", *given, "--heads=ridge,linear", "--pools=mean,2x2")
    assert code == 0, err
    result = json.loads(out.read_text())
    assert len(result["rows"]) == 2 * 2 * 2
    assert result["examples"] == {"trained_on": 160, "held_out": 40}
    assert result["settings"]["data"]["source"] == "arrays" and "digits" in text
    assert result["best"]["accuracy"] == max(r["accuracy"] for r in result["rows"])
    assert "t=0.3 (stage 0)  t=0.8 (stage 1)" in text and "linear, 2x2" in text
    assert f"best: {result['best']['accuracy']:.1%}" in text
    assert Image.open(out.with_suffix(".png")).size[0] > 300


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--times=high"], "--times=high"),
        (["--blocks=1.5"], "write whole numbers"),
        (["--source=arrays"], "config.data.path is empty"),
        (["--num=3"], "at least 10 examples"),
        (["--out=/x.png"], "name a JSON file"),
    ],
)
def test_wrong_flags_are_one_line(small_run, args, words):
    code, _, err = run("evaluate.probe", f"--checkpoint={small_run}", *args)
    assert code == 1 and "Traceback" not in err and words in err.splitlines()[-1], err
