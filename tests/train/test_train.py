import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppflow_jax.devices.sharding import (
    batch_sharding,
    layout,
    make_mesh,
    replicated,
    tree_shardings,
)
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import make_apply
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.train import loop as train_module
from ppflow_jax.train import program as program_module
from ppflow_jax.train.metrics_log import read_metrics
from ppflow_jax.train.optimizer import OptimConfig, learning_rate, make_optimizer
from ppflow_jax.train.state import init_state
from ppflow_jax.train.step import make_train_step
from tests.commands import ROOT, SMALL, train, weights

MODEL = ModelConfig(PPFLOW2, latent_size=8, channels=1, width=32, depth=2, heads=4, num_classes=10)
OBJECTIVE = FlowObjective(PPFLOW2, Flow(), 10)
HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 4242 on elsewhere")
file.flush()
print("held", flush=True)
time.sleep(600)
"""


def same(a, b):
    assert a.keys() == b.keys()
    return all(np.array_equal(a[k], b[k]) for k in a)


def test_a_run_leaves_what_its_owner_looks_for(small_training):
    workdir, out, err = small_training
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 7))
    assert {"loss", "loss/stage0", "loss/stage1", "grad_norm", "lr", "images_per_s"} <= set(rows[0])
    assert (workdir / "loss.png").stat().st_size > 1000
    assert (workdir / "samples" / "step_0000006.png").exists()
    assert list((workdir / "tensorboard").glob("events*"))
    assert "parameters; stages 4x4@0.5,2x2@1" in out
    assert "loss=" in err and "img/s" in err  # the progress bar
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "4", "6"]


def at_call(monkeypatch, name, call):
    """Send this process SIGTERM at the `call`-th use of `train.NAME`."""
    real, calls = getattr(train_module, name), []

    def signalled(*args):
        calls.append(None)
        if len(calls) == call:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(train_module, name, signalled)


def test_sigterm_saves_the_step_in_progress_and_the_same_command_goes_on(
    small_run, tmp_path, monkeypatch
):
    whole = small_run
    at_call(monkeypatch, "to_global", 3)
    code, out, err = train(tmp_path)
    assert code == 75 and "done" not in out
    assert "main: stopped at step 3 of 6" in err.splitlines()[-1]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    monkeypatch.undo()
    code, out, err = train(tmp_path)
    assert code == 0 and "continuing from step 3" in out, err
    for which in ("params", "ema"):
        assert same(weights(tmp_path, which), weights(whole, which))
    rows = [read_metrics(d / "metrics.jsonl") for d in (tmp_path, whole)]
    assert [r["step"] for r in rows[0]] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]


def test_sigterm_before_the_first_step_ends_at_once(tmp_path, monkeypatch):
    at_call(monkeypatch, "_announce", 1)
    code, _, err = train(tmp_path)
    assert code == 75 and "stopped at step 0 of 6" in err
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_workdir_in_use_is_refused_until_its_run_is_dead(small_run, tmp_path):
    workdir = shutil.copytree(small_run, tmp_path / "run")
    before = sorted(workdir.rglob("*"))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, workdir / ".lock"], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    try:
        code, _, err = train(workdir)
        assert code == 1 and len(err.strip().splitlines()) == 1
        assert f"main: {workdir} is in use by process" in err and "process 4242 on elsewhere" in err
        assert sorted(workdir.rglob("*")) == before
    finally:
        holder.kill()
        holder.wait()
    code, out, _ = train(workdir)
    assert code == 0 and "continuing from step 6" in out


@pytest.mark.long
def test_killed_and_rerun_equals_uninterrupted(small_run, tmp_path):
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "ppflow_jax.main", "--config=configs/digits.py", *SMALL]
    command += [f"--workdir={tmp_path}"]
    killed = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    saved = tmp_path / "checkpoints" / "2"
    deadline = time.monotonic() + 240
    while not saved.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "loss.png").exists()  # it was not done
    code, out, err = train(tmp_path)
    assert code == 0 and "continuing from step" in out, err
    for which in ("params", "ema"):
        assert same(weights(tmp_path, which), weights(small_run, which))


@pytest.mark.long
def test_init_from_takes_weights_only(small_run, tmp_path):
    first = weights(small_run, "ema")
    args = [f"--config.init_from={small_run}", "--config.optim.lr=1e-30", "--config.train.ema=0"]
    code, out, err = train(tmp_path, *args, "--config.train.steps=1")
    assert code == 0 and "weights from" in out, err
    assert same(weights(tmp_path), first)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    real = program_module.make_train_step

    def poisoned(*args, **options):
        step = real(*args, **options)

        def wrapped(state, batch, key, frozen):
            new, metrics = step(state, batch, key, frozen)
            bad = jnp.where(state["step"] == 4, jnp.nan, 1.0)
            return new | {"params": jax.tree.map(lambda p: p * bad, new["params"])}, metrics | {
                "loss": metrics["loss"] * bad
            }

        return wrapped

    monkeypatch.setattr(program_module, "make_train_step", poisoned)
    code, _, err = train(tmp_path, variant=":sit")
    assert code == 1
    line = err.strip().splitlines()[-1]
    assert "loss not finite at step 5" in line and "the checkpoint of step 4 is good" in line
    assert all(np.isfinite(v).all() for v in weights(tmp_path).values())


def run_steps(mesh, accumulate=1, steps=3, remat="none"):
    tx = make_optimizer(OptimConfig(lr=1e-3), steps)
    apply = make_apply(MODEL, remat=remat, layout=layout(mesh))
    init = lambda key: init_state(MODEL, tx, key)
    key = jax.random.key(0)
    shardings = tree_shardings(jax.eval_shape(init, key), mesh)
    state = jax.jit(init, out_shardings=shardings)(key)
    step = jax.jit(
        make_train_step(OBJECTIVE, apply, tx, ema=0.9, accumulate=accumulate),
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(steps):
        x = rng.normal(size=(64, 8, 8, 1)).astype(np.float32)
        batch = {"x": x, "label": rng.integers(0, 10, 64).astype(np.int32)}
        batch = jax.device_put(batch, batch_sharding(mesh))
        state, metrics = step(state, batch, jax.device_put(key, replicated(mesh)))
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == min(steps, 1)  # no recompilation during a run
    return losses, state


def single():
    return jax.make_mesh(
        (1, 1, 1),
        ("data", "fsdp", "tensor"),
        devices=jax.devices()[:1],
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )


@functools.cache
def alone():
    return run_steps(single())[0]


@pytest.mark.long
def test_eight_devices_equal_one():
    sizes = 2, 2, 2
    losses, state = run_steps(make_mesh(*sizes))
    np.testing.assert_allclose(losses, alone(), rtol=1e-5)
    kernel = state["params"]["blocks"]["fc1"]["kernel"]
    moment = state["opt_state"][0].mu["blocks"]["fc1"]["kernel"]
    assert kernel.sharding == moment.sharding
    assert kernel.addressable_shards[0].data.size * sizes[1] * sizes[2] == kernel.size


def test_accumulation_changes_only_the_rounding():
    accumulated, _ = run_steps(single(), accumulate=4)
    np.testing.assert_allclose(accumulated, alone(), rtol=1e-5)


def test_ema_and_first_step_of_adamw():
    _, state = run_steps(single(), steps=1)
    _, before = run_steps(single(), steps=0)
    start, now, ema = (
        tree["unpatchify"][0]["bias"] for tree in (before["params"], state["params"], state["ema"])
    )
    # Adam's first step is the learning rate; the variance channels get no gradient
    np.testing.assert_allclose(jnp.abs(now - start), np.tile([1e-3, 0], 16), rtol=1e-3)
    np.testing.assert_allclose(ema, 0.9 * start + 0.1 * now, atol=1e-7)


def test_learning_rate_schedules():
    warm = learning_rate(OptimConfig(lr=1.0, warmup_steps=10), 100)
    assert [float(warm(s)) for s in (0, 5, 10, 99)] == pytest.approx([0, 0.5, 1, 1])
    cosine = learning_rate(OptimConfig(lr=1.0, warmup_steps=10, schedule="cosine"), 110)
    assert [float(cosine(s)) for s in (10, 60, 110)] == pytest.approx([1, 0.5, 0], abs=1e-6)


def test_clipping_bounds_the_gradient():
    tx = make_optimizer(OptimConfig(lr=1.0, clip=1.0, b1=0.0, b2=0.0, eps=1.0), 10)
    params = {"w": jnp.zeros(4)}
    state = tx.init(params)
    updates, _ = tx.update({"w": jnp.full(4, 100.0)}, state, params)
    # eps 1 keeps the size: g / (|g| + 1) with |g| = 1/2 per entry
    np.testing.assert_allclose(updates["w"], -1 / 3, rtol=1e-5)
    assert isinstance(optax.tree.norm(updates), jax.Array)
