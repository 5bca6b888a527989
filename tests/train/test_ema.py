"""The moving average of the parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import make_apply
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.train.ema import initial_share, rate, reminder
from ppflow_jax.train.optimizer import OptimConfig, make_optimizer
from ppflow_jax.train.state import init_state
from ppflow_jax.train.step import make_train_step
from tests.commands import run, train, weights

MODEL = ModelConfig(PPFLOW2, latent_size=8, channels=1, width=16, depth=1, heads=2, num_classes=10)
OBJECTIVE = FlowObjective(PPFLOW2, Flow(), 10)


@pytest.mark.parametrize("ema", [0.0, 0.5, 0.99, 0.9999])
def test_warmup_is_the_formula_of_the_field(ema):
    for n in (0, 1, 8, 90, 1000, 10**6):
        expected = 1 - min(ema, (1 + n) / (10 + n))
        assert float(rate(ema, True, jnp.int32(n))) == pytest.approx(expected, rel=1e-6)
        assert rate(ema, False, jnp.int32(n)) == 1 - ema


@pytest.mark.parametrize(("ema", "warmup"), [(0.9, True), (0.99, True), (0.99, False)])
def test_the_share_of_the_first_weights(ema, warmup):
    share = 1.0
    for step in range(40):
        assert initial_share(ema, warmup, step) == pytest.approx(share, rel=1e-5)
        share *= 1 - float(rate(ema, warmup, jnp.int32(step)))


def parts():
    tx, apply = make_optimizer(OptimConfig(), 9), make_apply(MODEL)
    state = jax.eval_shape(lambda key: init_state(MODEL, tx, key), jax.random.key(0))
    x = jax.ShapeDtypeStruct((16, *MODEL.shape), jnp.float32)
    batch = {"x": x, "label": jax.ShapeDtypeStruct((16,), jnp.int32)}
    return tx, apply, (state, batch, jax.random.key(0))


def test_without_warmup_the_program_is_the_one_of_a_constant_decay():
    tx, apply, args = parts()

    def constant(state, batch, key):
        draws = OBJECTIVE.draw(
            jax.random.fold_in(key, state["step"]), {"x": batch["x"], "label": batch["label"]}
        )

        def loss(params):
            return OBJECTIVE.loss(apply, params, {}, {"x": batch["x"]}, draws, {})

        (total, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
        metrics = metrics | {"loss": total}
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {
            "step": state["step"] + 1,
            "params": params,
            "ema": optax.incremental_update(params, state["ema"], 1 - 0.9),
            "opt_state": opt_state,
        }, metrics | {"grad_norm": optax.tree.norm(grads)}

    def text(step):
        return str(jax.make_jaxpr(step)(*args))

    off = text(make_train_step(OBJECTIVE, apply, tx, ema=0.9, ema_warmup=False))
    assert off == text(constant) == text(make_train_step(OBJECTIVE, apply, tx, ema=0.9))
    on = jax.make_jaxpr(make_train_step(OBJECTIVE, apply, tx, ema=0.9, ema_warmup=True))(*args)
    assert str(on) != off
    # nothing is added but scalars
    plain = jax.make_jaxpr(constant)(*args)
    large = [sum(v.aval.size > 1 for e in j.eqns for v in e.outvars) for j in (plain, on)]
    assert large[0] == large[1]


@pytest.mark.long
def test_a_short_run_samples_what_it_learnt(small_sit, tmp_path):
    """The default of new runs: after 6 steps the EMA is near the parameters."""
    runs, far = {"on": small_sit, "off": tmp_path / "off"}, {}
    args = ["--config.train.ema=0.9999", "--config.train.ema_warmup=false"]
    code, out, err = train(runs["off"], *args, variant=":sit")
    assert code == 0 and "100% the weights that the run began with" in out, err
    for name, folder in runs.items():
        params, ema = weights(folder), weights(folder, "ema")
        far[name] = sum(float(np.abs(params[k] - ema[k]).sum()) for k in params)
    assert far["on"] < 0.5 * far["off"]

    line = "the EMA is still 100% the weights that the run began with (config.train.ema=0.9999)"
    sample = ["--num=2", "--steps=2"]
    for name, weight, there in (("on", "ema", 0), ("off", "ema", 1), ("off", "params", 0)):
        out = f"--out={tmp_path / name / weight}"
        flags = [f"--checkpoint={runs[name]}", f"--weights={weight}", out]
        code, said, err = run("sample", *flags, *sample)
        assert code == 0 and ("100% the weights" in said) == (line in said) == bool(there), err
        assert ("--weights=params" in said) == bool(there)
    copied = (tmp_path / "off" / "checkpoints" / "6").rename(tmp_path / "a-copy")
    code, said, _ = run("sample", f"--checkpoint={copied}", f"--out={tmp_path / 's'}", *sample)
    assert code == 0 and f"at step 6 {line}" in said


def test_who_is_reminded():
    assert reminder({"train": {"ema": 0.99, "ema_warmup": False}}, 400) is None
    assert "96%" in reminder({"train": {"ema": 0.9999}}, 400)  # of a run without the setting
    assert reminder({"train": {"ema": 0.9999, "ema_warmup": True}}, 400) is None
    assert "10%" in reminder({"train": {"ema": 0.9999, "ema_warmup": True}}, 1)
