"""What slices learn from the dense model: two terms, in phases, beside the balance."""

import functools
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppflow_jax as pf
from ppflow_jax.devices.programs import Programs
from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.terms import parse_phases, phased
from ppflow_jax.models.network import make_apply
from ppflow_jax.models.parts import BlockSpec, Mlp
from ppflow_jax.models.stack import Taps
from ppflow_jax.systems.clear import Clear
from ppflow_jax.systems.dense2moe import Dense2MoE, shared_only
from ppflow_jax.systems.dense2moe_distillation import SlicesDistil
from ppflow_jax.systems.mixer_distillation import check_teacher
from ppflow_jax.train.metrics_log import read_metrics
from tests import commands
from tests.systems.checks import compiled
from tests.systems.test_dense2moe import DENSE, PART, cut, halved, model_of

BOTH = {"experts": 1.0, "shared": 0.5, "balance": 0.01}


SETTINGS = SlicesDistil()
WEIGHTS = {"experts": {"experts": 1.0, "balance": 0.01}, "shared": {"shared": 1.0}, "both": BOTH}


def objective_of(part=PART, settings=SETTINGS):
    model = model_of(part)
    return settings.on(FlowObjective(model.pyramid, Flow(), model.null_label), model)


def batch():
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 4))
    return {"x": jnp.float32(x), "label": jnp.arange(4)}


@functools.cache
def loss_of(part, weights, settings=SETTINGS, gradient=False):
    """Total, metrics, and gradients to student and teacher."""
    objective = objective_of(part, settings)
    apply = make_apply(model_of(part), programs=Programs(experts="dense"))
    draws = objective.draw(jax.random.key(0), batch())

    def loss(params, teacher):
        frozen = {"teacher": teacher}
        return objective.loss(apply, params, frozen, batch(), draws, WEIGHTS[weights])

    params = halved(cut(part)[1])
    ours = jax.value_and_grad(loss, (0, 1), has_aux=True) if gradient else loss
    found = jax.jit(ours)(params, params)
    (total, metrics), grads = found if gradient else (found, None)
    return float(total), {k: float(v) for k, v in metrics.items()}, grads


def test_all_slices_with_gates_of_one_are_the_teacher():
    part = Dense2MoE(6, 6, gate="ones")
    total, metrics, _ = loss_of(part, "experts")
    assert metrics["experts"] < 1e-9 and total < 1e-9 and metrics["loss"] > 0.1
    assert "balance" not in metrics and "shared" not in metrics


def test_terms_are_what_they_are_called():
    """From predictions and tokens of student and teacher, one stage after the other."""
    total, metrics, _ = loss_of(PART, "both")
    ours_at, theirs_at = (compiled(m) for m in (model_of(PART), DENSE))
    dense, params = map(halved, cut())
    x1, draws = batch()["x"], objective_of().draw(jax.random.key(0), batch())
    expected = {"experts": 0, "shared": 0, "features": 0}
    taps, square = Taps(h=(1, 2)), lambda a: float(np.mean(np.square(np.float64(a))))
    for stage, rows in enumerate((slice(0, None, 2), slice(1, None, 2))):
        noise, t, y = (a[rows] for a in draws)
        x = t[:, None, None, None] * x1[rows] + (1 - t[:, None, None, None]) * noise
        ours = ours_at(params, x, t, y, stage, taps=taps)
        alone = ours_at(params, x, t, y, stage, parts=shared_only)
        theirs = theirs_at(dense, x, t, y, stage, taps=taps)
        expected["shared"] += square(alone - theirs.prediction) / 2
        expected["experts"] += square(ours.prediction - theirs.prediction) / 2
        for name, tokens in theirs.taps.items():
            relative = square(ours.taps[name] - tokens) / square(tokens)
            expected["features"] += relative / 2 / 2
    expected["experts"] += expected["features"]
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-3), name
    parts = expected["experts"] + 0.5 * expected["shared"] + 0.01 * metrics["balance"]
    assert total == pytest.approx(parts, rel=1e-3)
    _, metrics, _ = loss_of(PART, "experts", SlicesDistil(0.0))
    assert metrics["experts"] == pytest.approx(expected["experts"] - expected["features"], rel=1e-3)
    assert "features" not in metrics


@pytest.mark.long
def test_a_phase_trains_what_it_computes_and_the_teacher_never():
    for weights, trained in (("shared", False), ("experts", True)):
        _, metrics, (own, teacher) = loss_of(PART, weights, gradient=True)
        moe = own["blocks"]["moe"]
        assert all(bool(leaf.any()) == trained for leaf in jax.tree.leaves(moe)), weights
        assert own["blocks"]["fc1"]["kernel"].any() and metrics["loss"] > 0
        assert not any(leaf.any() for leaf in jax.tree.leaves(teacher))
        assert metrics.keys() & {"shared", "experts"} == {weights}


def test_phases_weigh_both_terms():
    assert phased(FlowObjective(DENSE.pyramid, Flow(), 5)) == {}
    always = {"balance": 0.01} | phased(objective_of())
    (phase,) = parse_phases((), 9, always, ())
    assert phase.active == {"experts": 1.0, "balance": 0.01}
    text = ((3, {"shared": 1, "experts": 0}), (9, {"shared": 0.5}))
    first, second = parse_phases(text, 9, always, ())
    assert first.active == {"shared": 1.0, "balance": 0.01}
    assert second.active == {"shared": 0.5, "experts": 1.0, "balance": 0.01}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SlicesDistil(features=-1.0), "features must be at least 0"),
        (lambda: SlicesDistil(every=0), "every at least 1"),
        (lambda: objective_of(Mlp()), "config.model.ffn is mlp: set it to dense2moe"),
        (lambda: objective_of(settings=SlicesDistil(every=3)), "the model has 2 blocks"),
        (
            lambda: check_teacher(objective_of(), model_of(PART)),
            "needs a dense teacher, this one has dense2moe",
        ),
        (
            lambda: SETTINGS.on(
                FlowObjective(DENSE.pyramid, Flow(), 5),
                replace(DENSE, block=BlockSpec(PART, mixer=Clear(9))),
            ),
            "config.model.mixer is clear",
        ),
        (lambda: objective_of().fields({"balance": 0.01}), "neither shared nor experts"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


@pytest.mark.long
def test_a_run_in_phases_continues_with_the_same_bits(tmp_path, small_run):
    """The commands of docs/dense2moe.md, from the ranked weights on."""
    ranked = tmp_path / "ranked"
    flags = [f"--source={small_run}", f"--target={ranked}", "--batches=1", "--batch=16"]
    assert commands.run("convert.rank", *flags)[0] == 0
    flags = [f"--config.train.teacher={ranked}", "--config.train.steps=4"]
    flags += ["--config.model.ffn=dense2moe:experts=6,top_k=2", "--config.flow.objective=dense2moe"]
    phases = ((1, {"shared": 1.0, "experts": 0.0}), (4, {}))
    flags += [f"--config.train.phases={phases}"]
    code, _, err = commands.train(tmp_path / "whole", *flags)
    assert code == 0, err
    rows = [row.keys() for row in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert [("shared" in row, "experts" in row) for row in rows] == [(True, False)] + 3 * [
        (False, True)
    ]
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
    code, out, err = commands.train(tmp_path / "killed", *flags)
    assert code == 0 and "continuing from step 2" in out, err
    whole, killed = (commands.weights(tmp_path / run) for run in ("whole", "killed"))
    assert all(leaf.tobytes() == killed[path].tobytes() for path, leaf in whole.items())
    model = pf.load(tmp_path / "whole")
    assert model.config.block == BlockSpec(PART)
    plan = model.plan(steps=2, accelerate="experts=0/2")
    assert model.sample(2, plan=plan).latents.shape == (2, 8, 8, 1)
