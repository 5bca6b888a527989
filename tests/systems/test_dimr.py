"""TD-LN and the loss at several resolutions: what they start as, what they cost, where they lead,
and their authors' numbers."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ppflow_jax as pf
from configs import digits
from ppflow_jax.devices.sharding import make_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.adapters import sites
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.layers import layer_norm
from ppflow_jax.models.network import abstract_params, make_apply
from ppflow_jax.models.parts import DIT, BlockSpec
from ppflow_jax.pyramid import PPFLOW2, SIT
from ppflow_jax.systems.dimr import (
    Affine,
    MultiResolution,
    TdLn,
    between,
    folded,
    pooled,
    rms_norm,
    squares,
)
from ppflow_jax.systems.moe import MoE
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.optimizer import OptimConfig, make_optimizer
from ppflow_jax.train.program import make_program
from tests import commands
from tests.systems.checks import compiled, random_params, within
from tests.systems_parity import SYSTEMS, Reference

REFERENCE = Path(__file__).parents[1] / "reference" / "systems"
PLAIN = ModelConfig(PPFLOW2, 8, 4, width=16, depth=2, heads=2, num_classes=5)
MODEL, RMS = (replace(PLAIN, block=BlockSpec(norm=TdLn(rms))) for rms in (False, True))
X, Y = jax.random.normal(jax.random.key(1), (4, 8, 8, 4)), jnp.arange(4)
both = pytest.mark.parametrize("model", [MODEL, RMS], ids=["norm", "rms"])


def test_norms_and_losses_are_the_authors():
    ref = Reference(REFERENCE / "dimr" / "dimr.npz")
    with jax.default_matmul_precision("highest"):
        rows = list(SYSTEMS["dimr"](ref))
    assert len(rows) >= 30
    within(rows)


def output(model, params, t, y=Y):
    return compiled(model)(params, X, jnp.full(4, t), y, 0)


@pytest.mark.parametrize("rms", [False, True])
def test_a_fresh_norm_is_the_plain_one_at_every_time(rms):
    part, own = TdLn(rms), nnx.to_pure_dict(nnx.state(Affine(16, rms)))
    assert sorted(own) == (["scale"] if rms else ["scale", "shift"])
    x = 3 + jnp.tile(X[:, 0], (1, 1, 4))
    plain = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True)) if rms else layer_norm(x, 1e-5)
    for t in (0.0, 0.3, 1.0):
        taus = part.vector(jnp.full(4, t), 16)
        assert float(taus[0, 0]) == pytest.approx(1 - 2 * t)  # noise, where t is 0, is at 1
        theta = {name: between(each, taus)[:, 0] for name, each in own.items()}
        ours = part(x, theta.get("shift", taus * 0), theta["scale"])
        np.testing.assert_allclose(ours, plain, atol=1e-6)


def test_far_from_noise_and_data_are_the_two_ends():
    rng = np.random.default_rng(0)
    ends, w = rng.normal(size=(2, 2, 16)), np.abs(rng.normal(size=(2, 16)))
    leaves = {"ends": jnp.float32(ends), "rate": jnp.float32(w), "offset": jnp.float32(w)}
    for tau, end in ((60.0, 0), (-60.0, 1)):
        found = between(leaves, jnp.full((1, 16), tau))[0]
        np.testing.assert_allclose(found, ends[:, end], rtol=1e-6)


def test_while_the_ends_are_one_only_they_learn():
    """theta_0 gets s of the gradient and theta_1 the rest."""
    leaves = {
        "ends": jnp.ones((2, 2, 16)),
        "rate": jnp.zeros((2, 16)),
        "offset": jnp.zeros((2, 16)),
    }
    tau = jnp.float32([[1.0] * 16, [-0.5] * 16])
    g = jax.random.normal(jax.random.key(0), (2, 2, 16))
    found = jax.grad(lambda leaves: jnp.sum(between(leaves, tau) * g))(leaves)
    assert not found["rate"].any() and not found["offset"].any()
    s = jax.nn.sigmoid(tau)[:, None]
    np.testing.assert_allclose(found["ends"][:, 0], jnp.sum(s * g, axis=0), atol=1e-6)
    np.testing.assert_allclose(found["ends"][:, 1], jnp.sum((1 - s) * g, axis=0), atol=1e-6)


def test_a_token_of_zeros_has_a_finite_gradient():
    assert np.isfinite(jax.grad(lambda x: jnp.sum(rms_norm(x)))(jnp.zeros(8))).all()


@both
def test_time_and_label_show_and_blocks_are_told_the_time_alone(model):
    params = random_params(model)
    one, other = (output(model, params, t) for t in (0.1, 0.9))
    assert float(jnp.abs(one - other).max()) > 0.1
    # the label enters at the input, not at the final layer alone
    blind = params | {"final_adaln": jax.tree.map(jnp.zeros_like, params["final_adaln"])}
    labels = (output(model, blind, 0.1, y) for y in (Y, Y + 1))
    assert float(jnp.abs(next(labels) - next(labels)).max()) > 0.1
    # of constant ends the norms know no time: it enters at the input and the final layer alone
    tdln = params["blocks"]["tdln"]
    tdln = {n: each | {"ends": each["ends"][:, :, :1].repeat(2, 2)} for n, each in tdln.items()}
    ends = {name: params[name] for name in ("time", "label", "level", "final_adaln")}
    closed = params | jax.tree.map(jnp.zeros_like, ends)
    still = closed | {"blocks": closed["blocks"] | {"tdln": tdln}}
    np.testing.assert_allclose(output(model, still, 0.1), output(model, still, 0.9), atol=1e-3)
    assert float(jnp.abs(output(model, closed, 0.1) - output(model, closed, 0.9)).max()) > 0.1


@both
def test_folded_weights_are_the_same_at_their_time_and_at_no_other(model):
    params = jax.tree.map(lambda leaf: leaf / 2, random_params(model))
    flat = folded(model, params, 0.3)
    for leaf in jax.tree.leaves(flat["blocks"]["tdln"]):
        assert set(np.unique(leaf)) <= {0.0, 1.0}
    with jax.default_matmul_precision("highest"):
        whole = output(model, params, 0.3)
        np.testing.assert_allclose(output(model, flat, 0.3), whole, rtol=2e-5, atol=2e-5)
        assert float(jnp.abs(output(model, flat, 0.6) - output(model, params, 0.6)).max()) > 0.01


def test_what_is_not_folded():
    for model in (PLAIN, replace(MODEL, block=replace(MODEL.block, ffn=MoE()))):
        with pytest.raises(InputError, match="only blocks of attention and MLP with norm=tdln"):
            folded(model, {}, 0.5)


@pytest.mark.parametrize(("rms", "per_width"), [(False, 16), (True, 8)])
def test_parameters_are_those_of_the_paper(rms, per_width):
    def count(block):
        model = ModelConfig(SIT, 32, 4, **SIZES["XL"], num_classes=1000, block=block)
        leaves = abstract_params(model)["blocks"]
        return sum(leaf.size for leaf in jax.tree.leaves(leaves)) // model.depth

    d = SIZES["XL"]["width"]
    adaln = 6 * d * d + 6 * d
    assert adaln == 7_969_536 and count(DIT) == 23_905_152  # 33% of a block
    assert count(BlockSpec(norm=TdLn(rms))) == count(DIT) - adaln + per_width * d


def test_rates_and_offsets_do_not_decay():
    own = nnx.to_pure_dict(nnx.state(Affine(16, rms=False)))
    own = jax.tree.map(lambda leaf: leaf + 2.0, own)
    params = {"blocks": {"tdln": own, "fc1": {"kernel": jnp.ones((2, 16, 16))}}}
    for name in ("adamw", "muon"):
        config = OptimConfig(name=name, lr=0.1, weight_decay=0.5)
        tx = make_optimizer(config, 9, (), TdLn.undecayed)
        still = jax.tree.map(jnp.zeros_like, params)
        updates = jax.jit(lambda p, g, tx=tx: tx.update(g, tx.init(p), p)[0])(params, still)
        for leaves in updates["blocks"]["tdln"].values():
            assert not leaves["rate"].any() and not leaves["offset"].any()
            assert np.abs(leaves["ends"]).max() > 1e-3
        assert np.abs(updates["blocks"]["fc1"]["kernel"]).max() > 1e-3
    plain = make_optimizer(OptimConfig(weight_decay=0.5), 9)
    old = optax.adamw(optax.constant_schedule(1e-4), weight_decay=0.5)
    assert jax.tree.structure(plain.init(params)) == jax.tree.structure(old.init(params))


def test_a_run_keeps_them_from_decay():
    config = digits.get_config()
    config.model.update(dict(width=16, depth=1, heads=2, norm="tdln"))
    config.optim.weight_decay = 0.1
    program = make_program(Experiment.from_config(config), make_mesh(devices=jax.devices()[:1]))
    plain = make_optimizer(OptimConfig(weight_decay=0.1), 9)
    other = jax.eval_shape(plain.init, program.abstract["params"])
    ours = jax.tree.structure(program.abstract["opt_state"])
    assert "MaskedState" in str(ours) and "MaskedState" not in str(jax.tree.structure(other))


def test_adapters_have_no_place_on_what_is_not_there():
    assert not {"blocks/adaln", "blocks/gates"} & {site.name for site in sites(MODEL)}
    assert {"blocks/adaln", "blocks/gates"} <= {site.name for site in sites(PLAIN)}


def test_other_weights_are_no_start():
    with pytest.raises(InputError, match="tdln cannot start from weights of mlp: leave init_from"):
        MODEL.block.start(MODEL, PLAIN, {}, jax.random.key(0))
    with pytest.raises(
        InputError, match="weights with tdln:rms=false do not start a model without"
    ):
        DIT.start(PLAIN, MODEL, {}, jax.random.key(0))


def test_averages_of_white_noise_keep_its_variance():
    noise = jax.random.normal(jax.random.key(0), (16, 32, 32, 4))
    for factor in (2, 4):
        assert float(jnp.var(pooled(noise, factor))) == pytest.approx(1, abs=0.03)
    np.testing.assert_array_equal(pooled(noise, 1), noise)


@pytest.mark.parametrize("prediction", ["velocity", "noise"])
def test_the_term_is_the_loss_at_lower_resolutions(prediction):
    """Of what the network predicts, by hand: the whole has coefficients 1/4 and 1."""
    term = MultiResolution((2,))
    weighting = "none" if prediction == "velocity" else "velocity"
    flow = Flow("linear", prediction)
    objective = FlowObjective(PPFLOW2, flow, 5, weighting=weighting, terms=(term,))
    batch, params = {"x": X, "label": Y}, random_params(PLAIN)
    draws = objective.draw(jax.random.key(2), batch)
    apply = make_apply(PLAIN)
    weights = {"multires": 1.0}
    total, metrics = jax.jit(lambda p: objective.loss(apply, p, {}, batch, draws, weights))(params)
    views, outputs = objective.predicted(apply, params, {}, batch, draws)
    by_hand, errors = [], []
    for view, output in zip(views, outputs):
        target = view.velocity if prediction == "velocity" else view.noise
        t = view.t[:, None, None, None]
        weight = 1.0 if prediction == "velocity" else 1 / t
        error = np.asarray((output.prediction - target) * weight)
        b, h, w, c = error.shape
        low = error.reshape(b, h // 2, 2, w // 2, 2, c).sum((2, 4)) / 2
        by_hand.append(np.square(low).mean() / 4)
        errors.append(float(jnp.mean(squares(view.error(output.prediction)))))
        np.testing.assert_allclose(errors[-1], np.square(error).mean(), rtol=1e-4)
    assert float(metrics["multires"]) == pytest.approx(np.dot(PPFLOW2.durations, by_hand), rel=1e-4)
    assert float(total) == pytest.approx(float(metrics["loss"] + metrics["multires"]), rel=1e-5)


def test_wrong_factors_are_refused():
    for factors in ((), (1,), (2, 2)):
        with pytest.raises(InputError, match="different whole numbers of at least 2"):
            MultiResolution(factors)
    with pytest.raises(InputError, match="factor 3 does not divide the latent of 8"):
        MultiResolution((3,)).init(PLAIN, jax.random.key(0))


@pytest.mark.long
def test_a_killed_run_goes_on_with_the_same_bits_and_samples(tmp_path):
    """A run as of docs/dimr.md; what the page folds computes the same."""
    flags = ["--config.model.norm=tdln", "--config.flow.terms=('multires:factors=2',)"]
    flags += ["--config.train.phases=((4, {'multires': 1.0}),)", "--config.train.steps=4"]
    code, _, err = commands.train(tmp_path / "whole", *flags)
    assert code == 0, err
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
    code, out, err = commands.train(tmp_path / "killed", *flags)
    assert code == 0 and "continuing from step 2" in out, err
    whole, killed = (commands.weights(tmp_path / run) for run in ("whole", "killed"))
    for path, leaf in whole.items():
        assert leaf.tobytes() == killed[path].tobytes(), path
    metrics = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert '"multires"' in metrics
    model = pf.load(tmp_path / "whole")
    assert model.config.block.norm == TdLn()
    assert model.sample(2, plan=model.plan(steps=2)).latents.shape == (2, 8, 8, 1)
    params = folded(model.config, model.params, t=0.0)
    x, y = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.arange(2)
    one, other = (compiled(model.config)(p, x, jnp.zeros(2), y, 0) for p in (params, model.params))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
