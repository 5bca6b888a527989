"""An MLP in slices: exact with all of them, and what of it is left with fewer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from ppflow_jax.checkpoints.weights import open_weights
from ppflow_jax.devices.programs import Programs
from ppflow_jax.errors import InputError
from ppflow_jax.flow.cost import sampling_flops
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.adapters import parse
from ppflow_jax.models.conditions import Channels
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.network import abstract_params, make_apply
from ppflow_jax.models.parts import BlockSpec, Mlp
from ppflow_jax.pyramid import PPFLOW2, SIT
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated
from ppflow_jax.systems.dense2moe import Dense2MoE, importance, ordered, shared_only, whole
from ppflow_jax.systems.moe import MoE
from ppflow_jax.train.importance import check_measurable, unit_importance
from tests import commands
from tests.systems.checks import compiled, random_params

DENSE = ModelConfig(PPFLOW2, 8, 4, width=16, depth=2, heads=2, num_classes=5)
PART = Dense2MoE(experts=6, top_k=2)


def model_of(part):
    return replace(DENSE, block=BlockSpec(part))


def cut(part=PART, params=None):
    """Parameters of the dense model, and in slices."""
    params = params or random_params(DENSE)
    model = model_of(part)
    blocks = model.block.start(model, DENSE, params["blocks"], jax.random.key(0))
    return params, params | {"blocks": blocks}


def halved(params):
    return jax.tree.map(lambda leaf: leaf / 2, params)


def output(part, params, stage=1, program="blocks", **options):
    x, t = jax.random.normal(jax.random.key(3), (2, 8, 8, 4)), jnp.full(2, 0.4)
    apply = compiled(model_of(part), programs=Programs(experts=program))
    return apply(params, x, t, jnp.arange(2), stage, **options)


@pytest.mark.parametrize("stage", [0, 1])
def test_all_slices_with_gates_of_one_are_the_mlp(stage):
    dense, slices = cut()
    expected = output(Mlp(), dense, stage)
    assert float(jnp.abs(expected).max()) > 1
    ours = output(Dense2MoE(6, 6, gate="ones"), slices, stage)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    # The same leaves under another part, and with the gates of a fresh router
    np.testing.assert_array_equal(output(PART, slices, stage, parts=whole), ours)
    fresh = output(Dense2MoE(6, 6), slices, stage)
    assert 0 < float(jnp.abs(fresh - expected).max()) < 0.05 * float(jnp.abs(expected).max())


def test_cutting_moves_bits_and_changes_none():
    """Put together again by the rule: unit i of expert e was unit shared + 6 i + e."""
    dense, slices = (params["blocks"] for params in cut())
    back, each = {}, slices["moe"]["up"].shape[-1]
    for name, leaf in (("fc1/kernel", "up"), ("fc1/bias", "up_bias"), ("fc2/kernel", "down")):
        module, kind = name.split("/")
        axis = 1 if name == "fc2/kernel" else -1  # of hidden units, depth first
        own = np.asarray(slices[module][kind])
        parts = np.asarray(slices["moe"][leaf])
        units = [np.take(parts[:, e], i, axis) for i in range(each) for e in range(6)]
        back[name] = np.concatenate([own, np.stack(units, axis)], axis)
        np.testing.assert_array_equal(back[name], dense[module][kind], err_msg=name)
    np.testing.assert_array_equal(slices["fc2"]["bias"], dense["fc2"]["bias"])
    assert slices["moe"]["up"].shape == (2, 6, 16, 8)


def test_no_experts_are_the_shared_slice_alone():
    dense, slices = cut()
    narrow = replace(DENSE, mlp_ratio=1.0)
    blocks = {name: leaf for name, leaf in slices["blocks"].items() if name != "moe"}
    x, t = jax.random.normal(jax.random.key(3), (2, 8, 8, 4)), jnp.full(2, 0.4)
    alone = compiled(narrow, programs=Programs(experts="blocks"))
    alone = alone(dense | {"blocks": blocks}, x, t, jnp.arange(2), 1)
    np.testing.assert_array_equal(output(Dense2MoE(6, 0), slices), alone)
    np.testing.assert_array_equal(output(PART, slices, parts=shared_only), alone)
    assert float(jnp.abs(alone - output(Mlp(), dense)).max()) > 1e-2


@pytest.mark.parametrize("program", ["ragged", "blocks", "dense"])
def test_a_token_passes_the_experts_with_the_largest_scores(program):
    """Against sums over experts of one block, written out."""
    _, slices = cut()
    rng = np.random.default_rng(1)
    router = jnp.float32(rng.normal(size=(2, 16, 6)))
    slices["blocks"]["moe"]["router"] = router
    for gate in ("softmax", "ones"):
        part = Dense2MoE(6, 2, gate=gate)
        block = jax.tree.map(lambda leaf: np.float64(leaf[0]), slices["blocks"])
        x = rng.normal(size=(20, 16))
        scores = np.exp(x @ block["moe"]["router"])
        scores /= scores.sum(1, keepdims=True)
        gelu = lambda a: a / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
        expected = gelu(x @ block["fc1"]["kernel"] + block["fc1"]["bias"]) @ block["fc2"]["kernel"]
        expected += block["fc2"]["bias"]
        for i, row in enumerate(x):
            for e in np.argsort(-scores[i])[:2]:
                hidden = gelu(row @ block["moe"]["up"][e] + block["moe"]["up_bias"][e])
                weight = 6 * scores[i, e] if gate == "softmax" else 1
                expected[i] += weight * hidden @ block["moe"]["down"][e]
        ours = through(part, slices["blocks"], jnp.float32(x)[None], program)
        np.testing.assert_allclose(ours[0], expected, rtol=1e-4, atol=1e-4)


def through(part, blocks, x, program):
    """The branch of the first block."""
    apply = compiled(model_of(part), programs=Programs(experts=program))

    def trunk(stacked, h, c):
        first = jax.tree.map(lambda leaf: leaf[0], stacked)
        return h, part(first, x)[0]

    params = random_params(DENSE) | {"blocks": blocks}
    zeros = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), jnp.zeros(1, int)
    return apply(params, *zeros, 1, trunk)[1]


def test_units_and_experts_in_another_order_are_the_same_model():
    dense, slices = cut()
    moe, order = slices["blocks"]["moe"], np.array([2, 0, 5, 3, 1, 4])
    moe["router"] = jnp.float32(np.random.default_rng(1).normal(size=(2, 16, 6)))
    turned = {k: v[:, order] for k, v in moe.items() if k != "router"}
    turned["router"] = moe["router"][..., order]
    other = slices | {"blocks": slices["blocks"] | {"moe": turned}}
    np.testing.assert_allclose(output(PART, other), output(PART, slices), rtol=1e-4, atol=1e-5)
    rank = np.random.default_rng(0).uniform(size=(2, 64))
    blocks = ordered(jax.tree.map(np.asarray, dense["blocks"]), rank)
    same = output(Mlp(), dense | {"blocks": blocks})
    np.testing.assert_allclose(same, output(Mlp(), dense), rtol=1e-5, atol=1e-5)


def test_the_most_important_units_are_shared():
    dense = random_params(DENSE)
    blocks = jax.tree.map(np.asarray, dense["blocks"])
    rank = np.random.default_rng(0).uniform(size=(2, 64))
    ranked = jax.tree.map(jnp.asarray, ordered(blocks, rank))
    _, slices = cut(params=dense | {"blocks": ranked})
    for layer in range(2):
        best = np.argsort(-rank[layer])
        own = blocks["fc1"]["kernel"][layer][:, best[:16]]
        np.testing.assert_array_equal(slices["blocks"]["fc1"]["kernel"][layer], own)
        third = best[16:][2::6]  # dealt in turn
        np.testing.assert_array_equal(
            slices["blocks"]["moe"]["down"][layer, 2], blocks["fc2"]["kernel"][layer][third]
        )


def test_importance_is_the_slope_along_the_weights_of_a_unit():
    """As found by scaling the column of fc1 and the row of fc2 of a unit."""
    params = random_params(DENSE)
    x, t = jax.random.normal(jax.random.key(3), (2, 8, 8, 4)), jnp.full(2, 0.4)
    apply = make_apply(DENSE)

    @jax.jit
    def loss(blocks):
        return jnp.mean(apply(params | {"blocks": blocks}, x, t, jnp.arange(2), 0) ** 2)

    blocks = params["blocks"]
    found = importance(blocks, jax.jit(jax.grad(loss))(blocks))
    assert found.shape == (2, 64)

    @jax.jit
    def scaled(s, layer, unit):
        fc1 = blocks["fc1"]["kernel"].at[layer, :, unit].multiply(s)
        fc2 = blocks["fc2"]["kernel"].at[layer, unit].multiply(s)
        fc1, fc2 = blocks["fc1"] | {"kernel": fc1}, blocks["fc2"] | {"kernel": fc2}
        return loss(blocks | {"fc1": fc1, "fc2": fc2})

    for layer, unit in ((0, 0), (0, 63), (1, 5)):
        slope = jax.grad(scaled)(1.0, layer, unit)
        assert float(found[layer, unit]) == pytest.approx(abs(float(slope)), rel=1e-3)


def test_of_flops_and_parameters_of_the_mlp_what_the_paper_has_is_left():
    """1 + 2 * 0.25 of 4 widths are active; the router is all that comes to the parameters."""
    xl = ModelConfig(SIT, 32, 4, **SIZES["XL"], num_classes=1000)
    ours = replace(xl, block=BlockSpec(Dense2MoE()))
    router = 2 * 256 * 1152 * 12
    assert Mlp().flops(xl, 256) * 0.375 == Dense2MoE().flops(ours, 256) - router
    assert Dense2MoE(top_k=12, gate="ones").flops(ours, 256) == Mlp().flops(xl, 256)
    assert Dense2MoE(top_k=0).flops(ours, 256) == Mlp().flops(xl, 256) // 4
    assert 0.595 < forward_flops(ours, 0) / forward_flops(xl, 0) < 0.605
    count = lambda m: sum(leaf.size for leaf in jax.tree.leaves(abstract_params(m)))
    assert count(ours) - count(xl) == 28 * 1152 * 12


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Dense2MoE(0), "experts must be at least 1"),
        (lambda: Dense2MoE(4, 5), "top_k in"),
        (lambda: Dense2MoE(shared=0.0), "shared above 0"),
        (lambda: Dense2MoE(gate="sigmoid"), "one of softmax, ones"),
        (lambda: model_of(Dense2MoE(5, 1)), "64 hidden units less 16 shared ones are not 5 equal"),
        (lambda: model_of(Dense2MoE(1, 1, shared=4.0)), "choose experts that divide them"),
        (
            lambda: PART.start(model_of(PART), model_of(MoE()), {}, jax.random.key(0)),
            "starts from mlp or the same slices, not from moe",
        ),
        (
            lambda: PART.start(model_of(PART), model_of(Dense2MoE(3)), {}, jax.random.key(0)),
            "not from dense2moe:experts=3",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_a_run_is_ranked_by_a_command(small_run, tmp_path):
    """The model computes what it did, and its units are in descending importance."""
    target = tmp_path / "ranked"
    flags = [f"--source={small_run}", "--batches=2", "--batch=32"]
    code, out, err = commands.run("convert.rank", *flags, f"--target={target}")
    assert code == 0 and "the first quarter of the units" in out, err
    source, found = (open_weights(path) for path in (small_run, target))
    assert found.card == source.card.alone
    blocks = [jax.tree.map(np.asarray, w.params["blocks"]) for w in (source, found)]
    rows = [np.hstack([b["fc1"]["kernel"][0].T, b["fc2"]["kernel"][0]]) for b in blocks]
    order = [int(np.flatnonzero((rows[0] == row).all(1))[0]) for row in rows[1]]
    assert sorted(order) == list(range(64)) and order != sorted(order)
    data = ConfigDict(source.card.experiment["data"])
    rank = unit_importance(source.card, source.params, data, 2, 32)[0]
    assert (np.diff(rank[order]) <= 0).all() and rank.min() >= 0 and rank.max() > 0
    code, _, err = commands.run("convert.rank", *flags, f"--target={target}")
    assert code == 1 and "exists: give a --target" in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (model_of(PART), "units of an MLP are ranked, and the model has dense2moe"),
        (replace(DENSE, adapters=parse("lora:rank=2")), "merge its adapters first"),
        (replace(DENSE, conditions=(Channels("low", channels=4),)), "conditions are low"),
    ],
)
def test_what_has_no_plain_mlp_is_not_ranked(model, words):
    with pytest.raises(InputError, match=words):
        check_measurable(model)


def test_a_plan_has_a_number_of_experts_for_every_stage():
    """No stage of it is another model, and its FLOPs are those of these models."""
    model, config = model_of(Dense2MoE(6, 2, gate="ones")), SamplerConfig("euler", 4)
    params = halved(cut(model.block.ffn)[1])
    noise, labels = jax.random.normal(jax.random.key(1), (2, *model.shape)), jnp.arange(2)

    def sampled(model, segments):
        return Sampler(make_apply(model), model, Flow(), config, segments=segments)(
            params, noise, labels
        )

    def plan(text):
        return accelerated(config, model, Flow(), AccelerateConfig.parse(text))

    exact, mixed, none = plan("exact"), plan("experts=0/2"), plan("experts=0")
    assert [s.method for s in plan("experts=2")] == [None, None] == [s.method for s in exact]
    assert [s.method and s.method.name for s in mixed] == ["0 experts", None]
    small = model_of(Dense2MoE(6, 0))
    own = accelerated(config, small, Flow(), AccelerateConfig())
    np.testing.assert_array_equal(sampled(model, none), sampled(small, own))
    cost = 2 * (forward_flops(small, 0) + forward_flops(model, 1))
    assert sampling_flops(model, mixed) == cost
    assert sampling_flops(model, none) == sampling_flops(small, own)
    found = sampled(model, mixed)
    for other in (exact, none):
        assert float(jnp.abs(found - sampled(model, other)).max()) > 1e-3


@pytest.mark.parametrize(
    ("model", "text", "words"),
    [
        (DENSE, "experts=1", "is for blocks with experts, and the model has mlp"),
        (model_of(PART), "experts=1/2/2", "give one, or one for each of the 2 stages"),
        (model_of(PART), "experts=7", "top_k in"),
        (model_of(MoE()), "experts=0", "top_k in"),
    ],
)
def test_numbers_of_experts_that_there_are_not_are_refused(model, text, words):
    config = SamplerConfig("euler", 4)
    with pytest.raises(InputError, match=words):
        accelerated(config, model, Flow(), AccelerateConfig.parse(text))
