"""Self-conditioning: nothing at the start, later blocks alone, no grid, and by hand."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ppflow_jax as pf
from configs import digits
from ppflow_jax.checkpoints.card import Card
from ppflow_jax.convert.infer import find_config
from ppflow_jax.convert.keys import key_table, to_torch
from ppflow_jax.convert.load import load_state
from ppflow_jax.cost.dry_run import dry_run
from ppflow_jax.cost.targets import Target
from ppflow_jax.devices.programs import Programs
from ppflow_jax.devices.sharding import make_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.conditions import Channels, split
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.feedback import turn
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.network import PPFlow, abstract_params, init_params, make_apply
from ppflow_jax.models.parts import BlockSpec, Execution
from ppflow_jax.models.stack import Taps
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated
from ppflow_jax.systems.dimr import TdLn
from ppflow_jax.systems.self_conditioning import SelfCondition
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.init_from import open_start
from tests import commands
from tests.meshes import check_alike, one_and_eight
from tests.systems.checks import compiled, random_params

PART = SelfCondition("middle")
PLAIN = ModelConfig(PPFLOW2, 8, 4, width=16, depth=3, heads=2, num_classes=5)
MODEL = replace(PLAIN, conditions=(replace(PART, blocks=2),))
X, T, Y = jax.random.normal(jax.random.key(1), (4, 8, 8, 4)), jnp.full(4, 0.4), jnp.arange(4)


def own(params):
    return params["conditions"]["middle"]


def with_own(params, **layers):
    return params | {"conditions": {"middle": own(params) | layers}}


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


def fresh(params):
    """The same with a second layer that is zero, as in a new model."""
    return with_own(params, fc2=jax.tree.map(jnp.zeros_like, own(params)["fc2"]))


def test_it_starts_as_the_model_without_it_bit_for_bit(params):
    plain = {name: leaf for name, leaf in params.items() if name != "conditions"}
    xs, ts, ys = (X[:2], X[2:]), (T[:2], T[2:] + 0.3), (Y[:2], Y[2:])
    ours = compiled(MODEL)(fresh(params), xs, ts, ys, (0, 1))
    theirs = compiled(PLAIN)(plain, xs, ts, ys, (0, 1))
    for a, b in zip(ours, theirs):
        np.testing.assert_array_equal(a.prediction, b.prediction)
    new = jax.jit(lambda key: init_params(MODEL, key))(jax.random.key(0))
    assert not any(leaf.any() for leaf in jax.tree.leaves(own(new)["fc2"]))
    assert own(new)["fc1"]["kernel"].any()


def test_later_blocks_and_the_final_layer_get_it_and_no_earlier_one(params):
    """The tokens after 2 of 3 blocks are the same to the last bit with whatever weights."""
    taps = Taps(h=(1, 2, 3))
    outputs = [compiled(MODEL)(p, X, T, Y, 0, taps=taps) for p in (params, fresh(params))]
    one, other = (output.taps for output in outputs)
    np.testing.assert_array_equal(one["h/1"], other["h/1"])
    np.testing.assert_array_equal(one["h/2"], other["h/2"])
    assert float(jnp.abs(one["h/3"] - other["h/3"]).max()) > 0.1
    # with blocks that are told nothing, the final layer still is
    closed = lambda p: (
        p | {"blocks": p["blocks"] | {"adaln": jax.tree.map(jnp.zeros_like, p["blocks"]["adaln"])}}
    )
    one, other = (compiled(MODEL)(closed(p), X, T, Y, 0) for p in (params, fresh(params)))
    assert float(jnp.abs(one - other).max()) > 0.1


def by_hand(params, stage, x, t, y):
    """Every block in turn, from the formula of the paper."""
    make = lambda: PPFlow(PLAIN, dtype=jnp.float32, remat="none", rngs=nnx.Rngs(0))
    graph, _ = nnx.split(nnx.eval_shape(make))
    net = nnx.merge(graph, {name: leaf for name, leaf in params.items() if name != "conditions"})
    h, (c,) = net.tokens(x, stage, split((), y)), net.embeddings((t,), (split((), y),), (stage,))
    for i in range(PLAIN.depth):
        if i == 2:
            g = jnp.mean(h, axis=1)
            g = g - jnp.mean(g, axis=-1, keepdims=True)
            g = g / jnp.sqrt(jnp.mean(g**2, axis=-1, keepdims=True) + 1e-6)
            w1, w2 = (own(params)[layer] for layer in ("fc1", "fc2"))
            z = g @ w1["kernel"] + w1["bias"][None]
            c = c + (z / (1 + jnp.exp(-z))) @ w2["kernel"] + w2["bias"][None]
        block = jax.tree.map(lambda leaf, i=i: leaf[i], net.blocks)
        h = block(h, jax.nn.silu(c))
    return net.prediction(h, jax.nn.silu(c), stage)


@pytest.mark.parametrize("stage", [0, 1])
def test_it_is_the_formula(params, stage):
    with jax.default_matmul_precision("highest"):
        theirs = jax.jit(by_hand, static_argnums=1)(params, stage, X, T, Y)
        ours = compiled(MODEL)(params, X, T, Y, stage)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_scanned_and_unrolled_blocks_and_stages_in_one_pass_agree(params):
    alone = [compiled(MODEL)(params, X, T, Y, stage) for stage in range(2)]
    for unrolled in (False, True):
        apply = compiled(MODEL, programs=Programs(unrolled=unrolled))
        found = apply(params, (X, X), (T, T), (Y, Y), (0, 1))
        for a, b in zip(found, alone):
            np.testing.assert_allclose(a.prediction, b, rtol=1e-4, atol=1e-4)


def middle(params):
    graph, _ = nnx.split(nnx.eval_shape(lambda: PART.module(MODEL, Execution(), nnx.Rngs(0))))
    return nnx.merge(graph, own(params))


def test_what_is_told_knows_no_grid(params):
    module = middle(params)
    token = jax.random.normal(jax.random.key(0), (4, 1, 16))
    few, many = (PART.added(module, jnp.tile(token, (1, n, 1))) for n in (4, 16))
    np.testing.assert_allclose(few, many, rtol=1e-5, atol=1e-5)
    assert few.shape == (4, 16)


def test_gradients_reach_the_middle_and_a_new_model_learns(params):
    def loss(params):
        return jnp.sum(make_apply(MODEL)(params, X, T, Y, 0) ** 2)

    grads, first = (jax.jit(jax.grad(loss))(p) for p in (params, fresh(params)))
    for leaf in jax.tree.leaves(own(grads)):
        assert np.abs(leaf).max() > 0
    assert np.abs(own(first)["fc2"]["kernel"]).max() > 0
    after, changed = turn(MODEL, lambda: {"middle": middle(params)}, (jnp.ones((4, 16)),))
    h, r = jax.random.normal(jax.random.key(3), (4, 5, 16)), jnp.arange(16.0)[None]
    of_h = jax.jit(jax.grad(lambda h: jnp.sum(changed((h,))[0] * r)))(h)
    assert after == 2 and np.abs(of_h).min(axis=2).max() > 0 and of_h.any(axis=2).all()


def test_guidance_and_sampling_need_nothing_more(params):
    config = SamplerConfig("euler", 4, cfg=(2.0,))
    noise = jax.random.normal(jax.random.key(2), (2, 8, 8, 4))
    plain = {name: leaf for name, leaf in params.items() if name != "conditions"}
    ours = Sampler(make_apply(MODEL), MODEL, Flow(), config)
    theirs = Sampler(make_apply(PLAIN), PLAIN, Flow(), config)
    labels = jnp.arange(2)
    whole = ours(fresh(params), noise, labels)
    np.testing.assert_allclose(whole, theirs(plain, noise, labels), rtol=1e-5, atol=1e-5)
    assert MODEL.asked == ()


def test_names_of_pytorch_and_cards_come_back(params):
    model = replace(PLAIN, conditions=(PART,))
    params = jax.tree.map(np.asarray, params)
    state = to_torch(model, params)
    assert len(state) == len(key_table(model)) and "conditions.middle.fc1.weight" in state
    assert find_config(state, "ppflow", heads=2, latent_size=8) == model
    jax.tree.map(np.testing.assert_array_equal, load_state(model, state).params, params)
    card = Card(MODEL, Flow(), "pixels")
    assert Card.from_json(json.loads(json.dumps(card.to_json()))) == card


def test_flops_are_those_of_the_compiler():
    wide = replace(PLAIN, width=128)
    model = replace(wide, conditions=(PART,))
    ours = forward_flops(model, 1) - forward_flops(wide, 1)
    assert ours == 4 * 128**2
    params = jax.eval_shape(lambda: random_params(model))
    run = lambda params, g: middle(params)(g)
    compiled = jax.jit(run).lower(params, jax.ShapeDtypeStruct((1, 128), jnp.float32)).compile()
    assert -0.07 < ours / compiled.cost_analysis()["flops"] - 1 < 0.01


@pytest.mark.long
def test_it_starts_from_a_run_without_it_and_goes_on_when_killed(tmp_path):
    """A run as in docs/self_conditioning.md, from weights without it."""
    deep = "--config.model.depth=2"
    code, _, err = commands.train(tmp_path / "plain", deep, "--config.train.steps=2")
    assert code == 0, err
    source = pf.load(tmp_path / "plain", weights="params")
    model = replace(source.config, conditions=(PART,))
    card = replace(source.card, model=model)
    _, start = open_start(str(tmp_path / "plain"), card, make_mesh())
    grown = jax.jit(start)(source.params, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, *model.shape))
    plain, ours = (
        compiled(m)(p, x, T, Y, 0, taps=Taps(h=(1,))).prediction
        for m, p in ((source.config, source.params), (model, grown))
    )
    np.testing.assert_array_equal(ours, plain)
    flags = [deep, "--config.train.steps=4", f"--config.init_from={tmp_path / 'plain'}"]
    flags.append("--config.model.conditions=('selfcond:name=middle',)")
    code, _, err = commands.train(tmp_path / "whole", *flags)
    assert code == 0, err
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "4")
    code, out, err = commands.train(tmp_path / "killed", *flags)
    assert code == 0 and "continuing from step 2" in out, err
    whole, killed = (commands.weights(tmp_path / run) for run in ("whole", "killed"))
    for path, leaf in whole.items():
        assert leaf.tobytes() == killed[path].tobytes(), path
    assert whole["conditions/middle/fc1/kernel"].any()
    assert whole["conditions/middle/fc2/kernel"].any()  # which was zero: it learns
    made = pf.load(tmp_path / "whole")
    assert made.sample(2, plan=made.plan(steps=2)).latents.shape == (2, 8, 8, 1)


def sharded(**mesh):
    config = digits.get_config()
    config.model.update(dict(width=32, depth=2, heads=4, conditions=(str(PART),)))
    config.data.batch_size = 32
    config.mesh.update(mesh)
    return config


@pytest.mark.long
def test_a_dry_run_finds_nothing_unexplained():
    config = sharded(data=2, fsdp=2, tensor=2)
    report = dry_run(config, Target("cpu:8", tuple(jax.devices()), None))
    for program in report.programs:
        causes = report.causes(program)
        assert not [c for c in causes if c[0].startswith("unexplained")], causes


@pytest.mark.long
def test_one_device_and_eight_agree():
    check_alike(*one_and_eight(Experiment.from_config(sharded())))


def test_leaves_are_small_enough_to_be_on_every_device():
    model = replace(PLAIN, **SIZES["S"], latent_size=32, num_classes=1000, conditions=(PART,))
    leaves = jax.tree.leaves(abstract_params(model))
    own_leaves = jax.tree.leaves(abstract_params(model)["conditions"])
    assert max(leaf.size for leaf in own_leaves) < 0.01 * sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(depth=2), "after 2 of 2 blocks; there must be a block"),
        (dict(depth=1, conditions=(PART,)), "after 0 of 1 blocks; there must be a block"),
        (dict(block=BlockSpec(norm=TdLn())), "the norm tdln:rms=false does not let them be told"),
        (dict(conditions=(PART, SelfCondition("other"))), "selfcond:name=other.* does too"),
    ],
)
def test_models_that_cannot_have_it(changes, words):
    with pytest.raises(InputError, match=words):
        replace(MODEL, **changes)
    with pytest.raises(InputError, match="blocks must be at least 0"):
        SelfCondition("middle", -1)


def test_values_for_it_are_refused():
    with pytest.raises(InputError, match="was given middle"):
        split(MODEL.conditions, {"label": Y, "middle": T})
    told = replace(MODEL, conditions=(*MODEL.conditions, Channels("low", 2)))
    assert [c.name for c in told.asked] == ["low"]


def test_what_takes_blocks_apart_is_refused_before_and_while_it_runs(params):
    config = SamplerConfig("euler", 8)
    velocity = AccelerateConfig.parse("forecast.interval=2,forecast.place=velocity")
    assert accelerated(config, MODEL, Flow(), velocity)
    for text in ("forecast.interval=2", "merge.ratio=0.5"):
        with pytest.raises(InputError, match=r"takes blocks apart cannot .* selfcond"):
            accelerated(config, MODEL, Flow(), AccelerateConfig.parse(text))
    with pytest.raises(InputError, match="takes blocks apart"):
        make_apply(MODEL)(params, X, T, Y, 0, lambda blocks, h, c: (h, None))
