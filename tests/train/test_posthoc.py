"""Averages whose length is chosen after training."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppflow_jax as pf
from ppflow_jax.errors import InputError
from ppflow_jax.files.store import CONFIG
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import make_apply
from ppflow_jax.pyramid import SIT
from ppflow_jax.train.optimizer import OptimConfig, make_optimizer
from ppflow_jax.train.posthoc import (
    POSTHOC,
    Profile,
    begin,
    check_widths,
    combination,
    exponent,
    rate,
    updated,
)
from ppflow_jax.train.skip import no_counts
from ppflow_jax.train.state import init_state
from ppflow_jax.train.step import make_train_step
from tests import commands

MODEL = ModelConfig(SIT, latent_size=8, channels=1, width=16, depth=1, heads=2, num_classes=10)
WIDTHS = (0.05, 0.1)
LAYER = ("blocks", "fc1", "kernel")


def weights_of(sigma, t, dtype=np.float64):
    """Of theta(1), ..., theta(t) in the average: those of a power function, by their sum."""
    edges = (np.arange(t + 1, dtype=dtype) / t) ** (exponent(sigma) + 1)
    return np.diff(edges)


@pytest.mark.parametrize(("sigma", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.15, 3.56)])
def test_widths_and_exponents_are_those_of_the_paper(sigma, gamma):
    """Its section 3.1 quotes the first two; the width is a standard deviation, here by sums."""
    assert exponent(sigma) == pytest.approx(gamma, abs=0.01)
    t = np.arange(1, 200_001) / 200_000
    weights = weights_of(sigma, len(t))
    mean = weights @ t
    assert np.sqrt(weights @ (t - mean) ** 2) == pytest.approx(sigma, rel=1e-4)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.28])
def test_tracking_gives_the_weights_of_a_power_function(sigma):
    share, found = jax.jit(lambda t: rate(sigma, t)), np.zeros(40)
    for t in range(1, 41):
        now = float(share(jnp.int32(t)))
        found *= 1 - now
        found[t - 1] = now
    np.testing.assert_allclose(found, weights_of(sigma, 40), rtol=1e-4, atol=1e-7)
    late = float(share(jnp.int32(400_000)))  # float32 keeps it
    assert late == pytest.approx((exponent(sigma) + 1) / 400_000, rel=1e-4)


def tracked(steps, widths, lr=1e-2):
    """Parameters and averages of a layer after every step of a small run."""
    tx = make_optimizer(OptimConfig(lr=lr), 9)
    state = init_state(MODEL, tx, jax.random.key(0))
    state = state | {POSTHOC: begin(state["params"], widths)}
    step = jax.jit(make_train_step(FlowObjective(SIT, Flow(), 10), make_apply(MODEL), tx, ema=0.9))
    x = jax.random.normal(jax.random.key(1), (8, 8, 8, 1))
    trees = []
    for _ in range(steps):
        state, _ = step(state, {"x": x, "label": jnp.arange(8)}, jax.random.key(2))
        every = {"params": state["params"]} | state[POSTHOC]
        trees.append({n: np.asarray(t["blocks"]["fc1"]["kernel"]) for n, t in every.items()})
    return trees


def combined(trees, sigma, every):
    times = range(every, len(trees) + 1, every)
    kept = [(s, t) for s in WIDTHS for t in times]
    profiles = [Profile(exponent(s), t) for s, t in kept]
    weights, missed = combination(profiles, Profile(exponent(sigma), len(trees)))
    return sum(w * np.float64(trees[t - 1][str(s)]) for w, (s, t) in zip(weights, kept)), missed


def test_a_length_that_was_tracked_comes_out_of_two_others():
    trees = tracked(60, (*WIDTHS, 0.15, 0.07))
    last = trees[-1]
    for sigma in (0.15, 0.07):
        away = np.linalg.norm(last[str(sigma)] - last["params"])
        found, missed = combined(trees, sigma, every=5)
        assert np.linalg.norm(found - last[str(sigma)]) < 0.01 * away and 0 < missed < 0.02
        direct = np.tensordot(weights_of(sigma, 60), [tree["params"] for tree in trees], 1)
        assert np.linalg.norm(direct - last[str(sigma)]) < 1e-3 * away
        few, missed_more = combined(trees, sigma, every=30)
        assert missed_more > 5 * missed
        assert np.linalg.norm(few - last[str(sigma)]) > 5 * np.linalg.norm(found - last[str(sigma)])
    found, missed = combined(trees, 0.1, every=20)  # one that is there
    np.testing.assert_allclose(found, last["0.1"], rtol=1e-6, atol=1e-8)
    assert missed < 1e-6


def test_what_does_not_change_is_its_own_average():
    value = jax.random.normal(jax.random.key(0), (1000,))
    state = {"step": jnp.int32(0), POSTHOC: begin({"w": value, "terms": {"own": value}}, WIDTHS)}
    assert "terms" not in state[POSTHOC]["0.05"]
    for step in range(20):
        state = {"step": jnp.int32(step)} | updated(state, {"w": value})
    kept = [np.asarray(state[POSTHOC][str(s)]["w"]) for s in WIDTHS]
    for average in kept:
        np.testing.assert_array_equal(average, value)
    for sigma in (0.03, 0.2):
        profiles = [Profile(exponent(s), t) for s in WIDTHS for t in range(2, 21, 2)]
        weights, _ = combination(profiles, Profile(exponent(sigma), 20))
        assert np.abs(weights).max() > 0.3  # and some are negative
        total = sum(w * np.float64(value) for w in weights)
        np.testing.assert_array_equal(np.float32(total), value)


def test_a_step_that_is_left_out_is_no_update():
    one, two = jnp.ones(3), 2 * jnp.ones(3)
    state = {"step": jnp.int32(4), "skipped": no_counts() | {"total": jnp.int32(3)}}
    state |= {POSTHOC: {"0.1": {"w": one}}}
    found = updated(state, {"w": two})[POSTHOC]["0.1"]["w"]
    np.testing.assert_allclose(found, 1 + (1 - 0.5 ** (exponent(0.1) + 1)), rtol=1e-5)
    assert updated({"step": jnp.int32(4)}, {"w": two}) == {}


@pytest.mark.parametrize("values", [(0,), (0.3,), (0.1, 0.1), ("x",), (float("nan"),)])
def test_what_is_no_width(values):
    with pytest.raises(InputError, match="config"):
        check_widths(values, "config.train.posthoc_ema")


ARGS = ["--config.train.steps=4", "--config.train.save_every=2", "--config.sample.steps=1"]
ON = [*ARGS, "--config.train.posthoc_ema=(0.05,0.1)"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("posthoc") / "run"
    code, _, err = commands.train(folder, *ON, variant=":sit")
    assert code == 0 and "post-hoc EMA of sigma_rel 0.05, 0.1: kept in" in err, err
    return folder


def snapshots(folder):
    return sorted(str(p.relative_to(folder / POSTHOC)) for p in (folder / POSTHOC).glob("*/*"))


def test_a_run_keeps_averages_that_every_reader_loads(run):
    expected = [f"{s}/step_000000{n}" for s in WIDTHS for n in (2, 4)]
    assert snapshots(run) == expected
    for name in expected:
        ours = commands.weights(run / POSTHOC / name, "ema")
        assert len(ours) > 10
    assert pf.load(run / POSTHOC / expected[-1]).sample(1).latents.shape == (1, 8, 8, 1)
    early, late = (commands.weights(run / POSTHOC / expected[n], "ema") for n in (0, 1))
    assert any(not np.array_equal(early[k], late[k]) for k in early)


def test_a_killed_run_keeps_the_same(run, tmp_path):
    """As one that was killed after it had written averages and before the checkpoint."""
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "4")
    half = copy / POSTHOC / "0.1" / ".step_0000004.123.partial"
    (copy / POSTHOC / "0.1" / "step_0000004").rename(half)
    kept = copy / POSTHOC / "0.05" / "step_0000004"
    (kept / "mark").touch()
    code, out, err = commands.train(copy, *ON, variant=":sit")
    assert code == 0 and "continuing from step 2" in out, err
    assert snapshots(copy) == snapshots(run) and not (kept / "mark").exists()
    for name in snapshots(run):
        ours, theirs = (commands.weights(f / POSTHOC / name, "ema") for f in (copy, run))
        assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)
    for which in ("params", "ema"):
        ours, theirs = (commands.weights(f, which) for f in (copy, run))
        assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)
    code, _, err = commands.train(copy, *ARGS, "--config.resume_changed=true", variant=":sit")
    assert code == 1 and "holds other averages (train.posthoc_ema: [0.05, 0.1] -> [])" in err


def convert(source, target, *args):
    return commands.run("convert", f"--source={source}", f"--target={target}", *args)


def test_the_command_makes_one_of_another_length(run, tmp_path):
    code, out, err = convert(run, tmp_path / "a", "--posthoc_ema=0.1")
    assert code == 0 and "sigma_rel 0.1 after 4 updates, of 4 averages" in out, err
    ours = commands.weights(tmp_path / "a", "ema")
    theirs = commands.weights(run / POSTHOC / "0.1" / "step_0000004", "ema")
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-7, err_msg=name)
    code, out, err = convert(run, tmp_path / "b", "--posthoc_ema=0.25")
    assert code == 0 and "that is far: the run kept sigma_rel 0.05, 0.1" in out, err
    code, out, err = commands.run(
        "sample", f"--checkpoint={tmp_path}/b", f"--out={tmp_path}/s", "--num=1", "--steps=1"
    )
    assert code == 0 and "the weights that the run began with" not in out, err


def test_what_the_command_refuses(run, small_sit, tmp_path):
    for source, args, words in (
        (small_sit, ["--posthoc_ema=0.1"], "train with --config.train.posthoc_ema"),
        (run, ["--posthoc_ema=0.5"], "in (0, 0.28]"),
        (run, ["--posthoc_ema=0.1", "--merge"], "in a second command"),
        (run, ["--posthoc_ema=0.1", "--to=torch"], "in a second command"),
    ):
        code, _, err = convert(source, tmp_path / "x", *args)
        assert code == 1 and words in err and err.strip().count("\n") == 0, err
    copy = shutil.copytree(run, tmp_path / "run")
    state = next((copy / POSTHOC / "0.05" / "step_0000002").glob("checkpoints/0/state/d/*"))
    state.write_bytes(b"x" * state.stat().st_size)
    code, _, err = convert(copy, tmp_path / "x", "--posthoc_ema=0.07")
    assert code == 1 and "step_0000002" in err and "damaged" in err, err
    assert not (tmp_path / "x").exists()
    config = copy / POSTHOC / "0.1" / "step_0000002" / "checkpoints" / "0" / CONFIG
    assert json.loads(config.read_text())[POSTHOC] == {"sigma_rel": 0.1, "updates": 2}
