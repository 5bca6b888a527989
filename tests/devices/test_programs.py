"""Which programs are chosen for which devices."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from ppflow_jax.devices import programs
from ppflow_jax.devices.programs import Programs, auto_attention, for_passes, for_training
from ppflow_jax.devices.sharding import make_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.models.network import make_apply
from ppflow_jax.train import program
from ppflow_jax.train.experiment import Experiment


def mesh_of(platform):
    devices = np.array([SimpleNamespace(platform=platform)])
    return Mock(spec=Mesh, devices=devices, size=1)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    programs._cudnn_failure.cache_clear()
    yield
    programs._cudnn_failure.cache_clear()


def test_auto_on_cpu_and_tpu(monkeypatch):
    monkeypatch.delattr(programs, "_cudnn_failure")  # nothing is tried there
    for dtype in (jnp.float32, jnp.bfloat16):
        assert for_passes(dtype=dtype) == Programs("deferred", rows=True, experts="blocks")
        assert for_passes(dtype=dtype, mesh=mesh_of("tpu")) == Programs("splash")


def test_cudnn_is_tried_once_for_a_width_of_heads(gpu, monkeypatch, capsys):
    seen = []

    def works(q):
        seen.append(q.shape[-1])
        return jnp.sum(q)

    monkeypatch.setattr(programs, "_cudnn_sum", works)
    for _ in range(2):
        assert for_passes(dtype=jnp.bfloat16) == Programs("cudnn")
    assert for_training(dtype=jnp.bfloat16, head=72) == Programs("cudnn")
    assert for_passes(dtype=jnp.float32) == Programs("xla")
    assert seen == [64, 72] and capsys.readouterr().err == ""


def test_without_cudnn_one_line_says_that_xla_does_it(gpu, monkeypatch, capsys):
    for _ in range(2):
        assert for_passes(dtype=jnp.bfloat16) == Programs("xla")  # the trial fails on this CPU
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("attention by XLA, because cuDNN's fails here: ")
    programs._cudnn_failure.cache_clear()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    for_passes(dtype=jnp.bfloat16)
    assert capsys.readouterr().err == ""


def test_what_auto_is_and_why(monkeypatch):
    """Decided by names alone: no such device is here."""
    tried = []
    monkeypatch.setattr(programs, "_cudnn_failure", lambda head: tried.append(head) or "")
    for head in (64, 72, 128):
        assert auto_attention("gpu", jnp.bfloat16, head)[0] == "cudnn"
    name, why = auto_attention("gpu", jnp.float32, 64)
    assert name == "xla" and "float32" in why
    for head in (36, 136):
        name, why = auto_attention("gpu", jnp.bfloat16, head)
        assert name == "xla" and str(head) in why
    assert tried == [64, 72, 128]
    monkeypatch.setattr(programs, "_cudnn_failure", lambda head: "no engine")
    assert auto_attention("gpu", jnp.bfloat16, 64) == ("xla", "cuDNN's fails here: no engine")
    assert auto_attention("metal", jnp.bfloat16, 64)[0] == "xla"


def test_only_one_cpu_without_remat_is_trained_with_unrolled_blocks():
    one, eight = make_mesh(devices=jax.devices()[:1]), make_mesh()
    assert for_training(mesh=one) == Programs(
        "deferred", rows=True, unrolled=True, experts="blocks"
    )
    assert not for_training(mesh=eight).unrolled
    assert not for_training(mesh=mesh_of("tpu")).unrolled
    assert not for_training(remat="dots", mesh=one).unrolled
    assert for_training(mesh=one).step_options and not for_training(mesh=eight).step_options


def test_programs_that_do_not_go_together_are_refused(gpu):
    with pytest.raises(InputError, match="auto, xla, deferred, cudnn, splash"):
        for_passes("flash")
    with pytest.raises(InputError, match="attention pallas is now splash"):
        for_passes("pallas")
    with pytest.raises(InputError, match="splash needs a TPU, and this is gpu"):
        for_passes("splash")
    with pytest.raises(InputError, match="cudnn needs an NVIDIA GPU, and this is tpu"):
        for_passes("cudnn", jnp.bfloat16, mesh=mesh_of("tpu"))
    with pytest.raises(InputError, match="needs dtype bfloat16"):
        for_passes("cudnn")
    assert for_passes("cudnn", jnp.bfloat16) == Programs("cudnn")  # asked for, so not tried


def trained(found, monkeypatch, steps=2):
    """Losses and gradient norms of training steps on one device, with the programs `found`."""
    config = importlib.import_module("configs.digits").get_config("sit")
    config.model.update(dict(width=32, depth=2, heads=2))
    config.data.batch_size = 8
    experiment = Experiment.from_config(config)
    monkeypatch.setattr(program, "for_training", lambda *args, **kwargs: found)
    made = program.make_program(experiment, make_mesh(devices=jax.devices()[:1]))
    state, rows = jax.jit(made.init)(jax.random.key(0)), []
    x = jax.random.normal(jax.random.key(1), (8, 8, 8, 1))
    for _ in range(steps):
        batch = {"x": x, "label": jnp.arange(8)}
        state, metrics = made.step(0)(state, batch, jax.random.key(2), {})
        rows.append([metrics["loss"], metrics["grad_norm"]])
    text = str(
        jax.make_jaxpr(lambda p: made.apply(p, x, jnp.full(8, 0.1), jnp.arange(8), 0))(
            state["params"]
        )
    )
    return np.array(rows), "scan[" in text


@pytest.mark.long
def test_the_scanned_step_is_the_unrolled_one(monkeypatch):
    """A CPU trains with unrolled blocks; what accelerators run gives the same."""
    unrolled, loops = trained(
        Programs("deferred", rows=True, unrolled=True, experts="blocks"), monkeypatch
    )
    assert not loops
    scanned, loops = trained(Programs(), monkeypatch)
    assert loops
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-5, atol=1e-6)


def test_a_network_takes_what_suits_the_default_device(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "ppflow_jax.models.network.for_passes",
        lambda **options: seen.append(options) or Programs(),
    )
    config = Experiment.from_config(importlib.import_module("configs.digits").get_config())
    make_apply(config.card.model, dtype=jnp.bfloat16)
    assert seen == [{"dtype": jnp.bfloat16, "head": 32}]
