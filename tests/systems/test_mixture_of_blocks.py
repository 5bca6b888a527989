"""A router that leaves out whole blocks, by the time alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import block_flops, forward_flops
from ppflow_jax.models.layers import timestep_features
from ppflow_jax.models.network import make_apply
from ppflow_jax.models.parts import BlockSpec
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated
from ppflow_jax.systems.mixture_of_blocks import MixtureOfBlocks, kept_blocks
from ppflow_jax.systems.switch import Switch
from tests.systems.checks import compiled, random_params

PLAIN = ModelConfig(PPFLOW2, 8, 4, width=16, depth=4, heads=2, num_classes=5)
TIMES = jnp.float32([0.1, 0.4, 0.6, 0.9])


def model_of(group, kept):
    return replace(PLAIN, block=BlockSpec(wrap=MixtureOfBlocks(group, kept)))


def with_router(router):
    """Blocks of `PLAIN` beside it."""
    params = random_params(PLAIN)
    return params, params | {"blocks": params["blocks"] | {"mob": {"router": jnp.float32(router)}}}


def output(model, params, t=TIMES, one_time=False, **options):
    x = jax.random.normal(jax.random.key(3), (4, 8, 8, 4))
    apply = compiled(model, one_time=one_time)
    return apply(params, x, t, jnp.arange(4), 1, **options)


def router():
    return np.random.default_rng(0).normal(size=(4, 16))


def test_where_all_are_kept_the_model_is_what_it_was():
    plain, params = with_router(router())
    np.testing.assert_allclose(
        output(model_of(2, 2), params), output(PLAIN, plain), rtol=1e-5, atol=1e-5
    )
    mob = MixtureOfBlocks(2, 2)
    started = mob.start(model_of(2, 2), PLAIN, plain["blocks"], jax.random.key(0))
    assert started["mob"]["router"].shape == (4, 16) and started.keys() - plain["blocks"] == {"mob"}


def gates(part, weights, t=TIMES):
    embed = lambda t: jnp.stack([jnp.cos(9 * t * i) for i in range(16)], -1)
    return part.signals({"router": jnp.float32(weights)}, embed, t)[0]


def test_of_every_group_as_many_as_asked_are_kept():
    """Those with the largest products of router and SiLU of the time's embedding."""
    for group, kept in ((2, 1), (4, 1), (4, 3), (1, 1)):
        found = np.asarray(gates(MixtureOfBlocks(group, kept), router()))
        hidden = np.stack([np.cos(9 * np.float64(TIMES) * i) for i in range(16)], -1)
        logits = (router() @ (hidden / (1 + np.exp(-hidden))).T).reshape(-1, group, 4)
        rank = np.argsort(np.argsort(-logits, axis=1), axis=1)
        np.testing.assert_array_equal(found.reshape(logits.shape), np.float32(rank < kept))
    chosen = np.asarray(gates(MixtureOfBlocks(2, 1), router())).T.tolist()
    assert any(one != chosen[0] for one in chosen)  # not the same at all times


def test_a_block_that_is_left_out_is_not_there():
    """The other blocks alone, as a model of their own, image by image."""
    plain, params = with_router(router())
    model = model_of(2, 1)
    found = output(model, params)
    leaves = {"router": params["blocks"]["mob"]["router"]}
    fc1, fc2 = params["time"]["fc1"], params["time"]["fc2"]

    def embed(t):
        hidden = timestep_features(t) @ fc1["kernel"] + fc1["bias"][None]
        return jax.nn.silu(hidden) @ fc2["kernel"] + fc2["bias"][None]

    keep = np.asarray(model.block.wrap.signals(leaves, embed, TIMES)[0]) > 0
    assert (keep.sum(0) == 2).all()
    short = replace(PLAIN, depth=2)
    for i in range(4):
        blocks = jax.tree.map(lambda leaf, i=i: leaf[keep[:, i]], plain["blocks"])
        alone = output(short, plain | {"blocks": blocks})[i]
        np.testing.assert_allclose(found[i], alone, rtol=1e-4, atol=1e-5)
        # and of images of one time nothing else is computed
        t, out = jnp.full(4, TIMES[i]), jnp.asarray(~keep[:, i]).nonzero()[0]
        poisoned = jax.tree.map(lambda leaf, out=out: leaf.at[out].set(jnp.nan), plain["blocks"])
        poisoned["mob"] = params["blocks"]["mob"]
        ours, _ = output(model, params | {"blocks": poisoned}, t, True, trunk=kept_blocks)
        np.testing.assert_allclose(ours[i], found[i], rtol=1e-4, atol=1e-5)
    known = output(model, params, t, one_time=True)
    np.testing.assert_allclose(known[i], found[i], rtol=1e-4, atol=1e-5)


def test_the_router_learns_by_the_share_of_its_group():
    """What is left out has a say through the softmax, and the value is that of 0 and 1."""
    _, params = with_router(router())
    apply, model = make_apply(model_of(2, 1)), model_of(2, 1)

    def loss(blocks):
        x = jax.random.normal(jax.random.key(3), (4, 8, 8, 4))
        return jnp.sum(apply(params | {"blocks": blocks}, x, TIMES, jnp.arange(4), 1) ** 2)

    gradient = jax.jit(jax.grad(loss))(params["blocks"])["mob"]["router"]
    pairs = np.asarray(gradient).reshape(2, 2, 16)
    assert (np.abs(pairs).max(-1) > 1e-6).all()
    np.testing.assert_allclose(pairs[:, 0], -pairs[:, 1], rtol=1e-3, atol=1e-3)
    assert model.block.wrap.term_names == ()


def test_a_plan_counts_what_is_computed():
    model, config = model_of(4, 1), SamplerConfig("euler", 4)
    plan = accelerated(config, model, Flow(), AccelerateConfig.parse("mob=true,mob.stages=1"))
    assert [s.method and s.method.name for s in plan] == [None, "left out"]
    cost = plan[1].method.flops(model, 1, False, {})
    one = block_flops(PLAIN, 1)
    assert cost == forward_flops(PLAIN, 1) - 3 * one + 4 * 2 * 16
    off = accelerated(config, model, Flow(), AccelerateConfig.parse("mob=false"))
    assert [s.method for s in off] == [None, None]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MixtureOfBlocks(2, 3), "kept in"),
        (lambda: MixtureOfBlocks(0, 0), "group must be at least 1"),
        (lambda: model_of(3, 1), "4 blocks are not whole groups of 3"),
        (
            lambda: accelerated(
                SamplerConfig("euler", 4), PLAIN, Flow(), AccelerateConfig.parse("mob=true")
            ),
            "mob is for blocks with a router that leaves some out, and the model has mlp",
        ),
        (
            lambda: accelerated(
                SamplerConfig("euler", 4),
                replace(PLAIN, block=BlockSpec(wrap=Switch(2, 1))),
                Flow(),
                AccelerateConfig.parse("mob=true"),
            ),
            "is for blocks with a router",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()
