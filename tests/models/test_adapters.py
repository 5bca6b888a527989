"""Adapters beside kernels: one formula, its start, and its end in plain kernels."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppflow_jax.checkpoints.card import Card
from ppflow_jax.convert.keys import key_table, to_torch
from ppflow_jax.convert.load import load_state
from ppflow_jax.cost.measure import xla_forward_flops
from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.adapters import adapter_paths, merge, parse, plain, sites, text
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.layers import Linear
from ppflow_jax.models.network import abstract_params, init_params, make_apply
from ppflow_jax.models.trees import join, leaves, parted, split
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.systems.registry import take_block
from tests.systems.checks import compiled, random_params

BASE = ModelConfig(PPFLOW2, latent_size=8, channels=1, width=16, depth=2, heads=2, num_classes=5)
KINDS = {
    "everything": "affiner:rank=2,alpha=5,on=.*;scale:on=blocks/gates",
    "some": "lora:rank=2,alpha=3,rslora=true,on=.*/(fc[12]|qkv);shift:on=blocks/fc1;"
    "scale:on=blocks/(adaln|gates)",
}
each = pytest.mark.parametrize("kind", KINDS)


def model_of(kind, base=BASE):
    return replace(base, adapters=parse(KINDS[kind]))


def output(model, params):
    """Of both stages."""
    x = jax.random.normal(jax.random.key(1), (4, *model.shape))
    inputs = ((a, a) for a in (x, jnp.full(4, 0.4), jnp.arange(4)))
    both = compiled(model)(params, *inputs, (0, 1))
    return np.stack([out.prediction for out in both])


def close(ours, theirs):
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


@each
def test_fresh_adapters_change_no_bit(kind):
    model = model_of(kind)
    fresh, base = init_params(model, jax.random.key(0)), init_params(BASE, jax.random.key(0))
    own = adapter_paths(model)
    added, rest = parted(fresh, lambda path: path in own)
    jax.tree.map(np.testing.assert_array_equal, rest, base)
    assert {path for path, _ in leaves(added)} == own
    shown = random_params(BASE)
    ours, theirs = output(model, join(shown, added)), output(BASE, shown)
    assert np.array_equal(ours, theirs) and np.abs(theirs).max() > 0.1


@each
def test_merged_kernels_compute_the_same(kind):
    model = model_of(kind)
    params = random_params(model)
    merged = merge(model, params)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, abstract_params(plain(model)))
    theirs = output(model, params)
    close(output(BASE, merged), theirs)
    without = parted(params, lambda path: path not in adapter_paths(model))[0]
    assert np.abs(output(BASE, without) - theirs).max() > 0.01


def test_the_formula():
    """In NumPy, of every linear layer that can be called."""
    rng = np.random.default_rng(0)
    layer = Linear(6, 4, rngs=nnx.Rngs(0))
    shapes = {"bias": (4,), "gamma": (4,), "beta": (4,), "lora_a": (6, 2), "lora_b": (2, 4)}
    w = {"kernel": np.asarray(layer.kernel[...])}
    x = np.float32(rng.normal(size=(2, 3, 6)))
    for name, shape in shapes.items():
        w[name] = np.float32(rng.normal(size=shape))
        setattr(layer, name, nnx.Param(jnp.asarray(w[name])))
    layer.factor = 0.7
    expected = w["gamma"] * (x @ w["kernel"] + w["bias"]) + w["beta"]
    expected = expected + 0.7 * (x @ w["lora_a"]) @ w["lora_b"]
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_without_adapters_a_layer_is_flaxs():
    ours, theirs = (make(6, 4, rngs=nnx.Rngs(0)) for make in (Linear, nnx.Linear))
    x = jnp.ones((2, 6))
    assert str(jax.make_jaxpr(lambda x: ours(x))(x)) == str(jax.make_jaxpr(lambda x: theirs(x))(x))


@each
def test_texts_cards_and_pytorch_names_come_back(kind):
    model = model_of(kind)
    assert parse(text(model.adapters)) == model.adapters
    card = Card(model, Flow(), "pixels")
    assert Card.from_json(json.loads(json.dumps(card.to_json()))) == card
    base = Card(plain(model), Flow(), "pixels")
    assert "adapters" not in base.to_json()["model"]
    assert base.differences(card).startswith("adapters: none -> ")
    params = jax.tree.map(np.asarray, random_params(model))
    state = to_torch(model, params)
    assert len(state) == len(key_table(model))
    jax.tree.map(np.testing.assert_array_equal, load_state(model, state).params, params)


def test_names_are_those_of_peft():
    """W + s B A of the PyTorch layout is the merged weight, also where pixels are reordered."""
    model = model_of("everything")
    params = jax.tree.map(np.asarray, random_params(model))
    state, merged = to_torch(model, params), to_torch(BASE, merge(model, params))
    for name in (
        "blocks.1.attn.qkv",
        "x_embedder.proj1",
        "final_layer.linear1",
        "t_embedder.mlp.0",
    ):
        w, a, b, gamma = (
            state[f"{name}.{leaf}"].reshape(rows, -1)
            for leaf, rows in (
                ("weight", len(state[f"{name}.bias"])),
                ("lora_A.weight", 2),
                ("lora_B.weight", len(state[f"{name}.bias"])),
                ("gamma", len(state[f"{name}.bias"])),
            )
        )
        whole = merged[f"{name}.weight"].reshape(w.shape)
        np.testing.assert_allclose(gamma * w + 2.5 * b @ a, whole, rtol=1e-5, atol=1e-6)


def test_flops_are_those_of_the_compiler():
    base = replace(BASE, width=128, latent_size=16)
    model = replace(base, adapters=parse("lora:rank=16,on=.*"))
    ours = forward_flops(model, 0) - forward_flops(base, 0)
    count = lambda m: xla_forward_flops(m, make_apply(m), 0, gradient=False)
    theirs = count(model) - count(base)
    assert -0.07 < ours / theirs - 1 < 0.01  # it also counts what is done element by element


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        ("nothing", "unknown adapter 'nothing': one of lora, scale"),
        ("lora:rank=0", "rank must be at least 1"),
        ("lora:rank=a", "rank cannot be 'a'"),
        ("lora:size=3", "unknown key 'size', lora has rank, alpha, rslora, on"),
        ("scale:rank=3", "unknown key 'rank', scale has on"),
        ("lora:on=blocks/(", "no regular expression"),
        ("lora:on=blocks/moe", "on=blocks/moe is none of blocks/attention/qkv"),
        ("lora:on=blocks/gates", "none of"),
        ("lora:on=blocks/fc1;affiner:on=blocks/.*", "two have lora_a, lora_b on blocks/fc1"),
    ],
)
def test_wrong_adapters_are_refused(adapters, words):
    with pytest.raises(InputError, match=words) as error:
        replace(BASE, adapters=parse(adapters))
    assert "\n" not in str(error.value)


def test_other_blocks_have_other_sites():
    moe = replace(BASE, block=take_block({"ffn": "moe:experts=3"}))
    assert {s.name for s in sites(BASE)} - {s.name for s in sites(moe)} == {
        "blocks/fc1",
        "blocks/fc2",
    }
    model = replace(moe, adapters=parse("affiner:rank=2,on=.*"))
    params = random_params(model)
    close(output(moe, merge(model, params)), output(model, params))


def test_a_tree_is_split_and_joined():
    params = init_params(BASE, jax.random.key(0))
    chosen, rest = split(params, ("patchify/.*", ".*bias"))
    assert set(chosen["patchify"]) == {0, 1} and "patchify" not in rest
    assert set(chosen["blocks"]["fc1"]) == {"bias"} and set(rest["blocks"]["fc1"]) == {"kernel"}
    assert "bias" in chosen["time"]["fc1"] and "label" not in chosen  # whole paths are matched
    for a, b in ((chosen, rest), (rest, chosen), (params, {})):
        joined = join(a, b)
        assert jax.tree.structure(joined) == jax.tree.structure(params)
        assert all(x is y for x, y in zip(jax.tree.leaves(joined), jax.tree.leaves(params)))
    with pytest.raises(ValueError, match="in both trees"):
        join(params, chosen)
