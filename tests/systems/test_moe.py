"""Mixtures of experts: the programs, the balance, upcycling, and their authors' numbers."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.devices.programs import Programs
from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import Draws, FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.terms import Phase
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.network import Output, abstract_params
from ppflow_jax.models.parts import DIT, BlockSpec
from ppflow_jax.pyramid import PPFLOW2, SIT
from ppflow_jax.systems.experts import mixture
from ppflow_jax.systems.moe import MoE, balance
from tests.systems.checks import compiled, random_params, within
from tests.systems_parity import SYSTEMS, Reference

REFERENCE = Path(__file__).parents[1] / "reference" / "systems"


def test_the_layer_is_the_authors():
    ref = Reference(REFERENCE / "dit_moe" / "dit_moe.npz")
    with jax.default_matmul_precision("highest"):
        rows = list(SYSTEMS["dit_moe"](ref))
    assert len(rows) > 40
    within(rows)


def inputs(tokens=50, experts=5, top_k=2, width=8, hidden=12):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.float32(rng.normal(size=shape))
    weights = {"up": draw(experts, width, hidden), "down": draw(experts, hidden, width)}
    used = np.array([e for e in range(experts) if e != 1])  # expert 1 gets no token
    expert = np.stack([rng.permutation(used)[:top_k] for _ in range(tokens)])
    gate = jnp.float32(rng.uniform(size=(tokens, top_k)))
    return weights, draw(tokens, width), gate, jnp.asarray(expert), draw(experts, width, hidden)


def one_by_one(weights, x, gate, expert):
    out = np.zeros(x.shape)
    for i, row in enumerate(np.float64(x)):
        for g, e in zip(np.asarray(gate[i]), np.asarray(expert[i])):
            up, down = (np.float64(weights[name][e]) for name in ("up", "down"))
            if "gate" in weights:
                a = row @ np.float64(weights["gate"][e])
                h = a / (1 + np.exp(-a)) * (row @ up)
            else:
                a = row @ up + np.float64(weights["up_bias"][e])
                h = a / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
            out[i] += g * (h @ down)
    return out


@pytest.mark.parametrize("tokens", [50, 3, 1])
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_programs_are_the_sum_over_experts(kind, tokens):
    weights, x, gate, expert, extra = inputs(tokens)
    weights |= {"gate": extra} if kind == "swiglu" else {"up_bias": extra[:, 0]}
    expected = one_by_one(weights, x, gate, expert)
    for program in ("ragged", "blocks", "dense"):
        ours = jax.jit(mixture, static_argnums=0)(program, weights, x, gate, expert)
        np.testing.assert_allclose(ours, expected, atol=2e-5, err_msg=program)


def test_all_tokens_at_one_expert():
    weights, x, gate, expert, extra = inputs(tokens=40, top_k=1)
    weights |= {"gate": extra}
    for chosen in (0, 4):
        expert = jnp.full_like(expert, chosen)
        ours = mixture("blocks", weights, x, gate, expert)
        np.testing.assert_allclose(ours, mixture("dense", weights, x, gate, expert), atol=2e-5)


def test_gradients_of_the_programs_agree():
    weights, x, gate, expert, extra = inputs()
    weights |= {"gate": extra}

    def gradient(program):
        loss = lambda weights, x, gate: jnp.sum(mixture(program, weights, x, gate, expert) ** 2)
        return jax.jit(jax.grad(loss, (0, 1, 2)))(weights, x, gate)

    dense = gradient("dense")
    for program in ("ragged", "blocks"):
        for a, b in zip(jax.tree.leaves(gradient(program)), jax.tree.leaves(dense)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_the_balance_is_one_when_experts_are_used_alike():
    uniform = jnp.full((2, 6, 4), 0.25)
    alike = jnp.arange(24).reshape(2, 6, 2) % 4
    assert float(balance(uniform, alike)) == pytest.approx(1)
    certain = jax.nn.softmax(jnp.tile(jnp.array([50.0, 50.0, 0.0, 0.0]), (2, 6, 1)))
    assert float(balance(certain, jnp.tile(jnp.arange(2), (2, 6, 1)))) == pytest.approx(2)  # E / K


SMALL = ModelConfig(PPFLOW2, 8, 4, width=16, depth=2, heads=2, num_classes=5)


def output(model, params, stage=1):
    x, t = jax.random.normal(jax.random.key(3), (2, 8, 8, 4)), jnp.full(2, 0.4)
    apply = compiled(model, programs=Programs(experts="dense"))
    return apply(params, x, t, jnp.arange(2), stage)


def test_experts_in_another_order_are_the_same_model():
    model = replace(SMALL, block=BlockSpec(MoE(4)))
    params, order = random_params(model), np.array([2, 0, 3, 1])
    moe = params["blocks"]["moe"]
    turned = {k: v if k == "shared" else v[:, order] for k, v in moe.items()}
    turned["router"] = moe["router"][..., order]
    other = params | {"blocks": params["blocks"] | {"moe": turned}}
    assert float(jnp.abs(output(model, params)).max()) > 1
    np.testing.assert_allclose(output(model, other), output(model, params), atol=1e-5)


def test_one_expert_is_an_mlp():
    params = random_params(SMALL)
    model = replace(SMALL, block=BlockSpec(MoE(1, 1, 0, expert="gelu")))
    blocks = model.block.start(model, SMALL, params["blocks"], jax.random.key(0))
    np.testing.assert_allclose(
        output(model, params | {"blocks": blocks}), output(SMALL, params), atol=1e-5
    )


@pytest.mark.parametrize(
    ("part", "source"),
    [
        (MoE(), DIT),
        (MoE(expert="gelu"), DIT),
        (MoE(4), BlockSpec(MoE(2))),
        (MoE(4), BlockSpec(MoE(1, 1, expert="gelu"))),
    ],
)
def test_there_is_no_way_from_other_weights(part, source):
    model = replace(SMALL, block=BlockSpec(part))
    with pytest.raises(InputError, match="cannot start from weights with"):
        model.block.start(model, replace(SMALL, block=source), {}, jax.random.key(0))


@pytest.mark.parametrize(
    "settings", [dict(experts=0), dict(top_k=9), dict(top_k=0), dict(shared=-1), dict(expert="x")]
)
def test_impossible_mixtures_are_refused(settings):
    with pytest.raises(InputError, match="moe:experts="):
        MoE(**settings)


@pytest.mark.parametrize(
    ("size", "experts", "total"),
    [
        ("S", 8, 199_307_552),
        ("S", 16, 369_213_728),
        ("B", 8, 795_861_536),
        ("XL", 8, 4_168_164_128),
    ],
)
def test_parameter_counts_are_the_published_ones(size, experts, total):
    model = ModelConfig(SIT, 32, 4, **SIZES[size], num_classes=1000, block=BlockSpec(MoE(experts)))
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))
    assert count + 256 * model.width == total  # theirs has the fixed positions


def test_the_term_is_added_to_what_is_minimised_and_not_to_the_loss():
    objective = FlowObjective(PPFLOW2, Flow(), 5)

    def apply(params, xs, ts, ys, stages):
        return tuple(Output(0 * x, {"balance": jnp.float32(1 + s)}) for x, s in zip(xs, stages))

    x1, draws = (
        jnp.ones((4, 4, 4, 1)),
        Draws(jnp.zeros((4, 4, 4, 1)), jnp.full(4, 0.5), jnp.arange(4)),
    )
    total, metrics = objective.loss(apply, {}, {}, {"x": x1}, draws, {"balance": 0.5})
    assert float(metrics["loss"]) == 1 and float(metrics["balance"]) == 1.5
    assert float(total) == 1.75
    with pytest.raises(InputError, match="at least 0, got balance -1"):
        Phase(9, (("balance", -1.0),))
