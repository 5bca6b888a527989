"""Conditions of every kind: off is off, they start as nothing, and each image has its own."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.checkpoints.card import Card
from ppflow_jax.convert.infer import find_config
from ppflow_jax.convert.keys import to_torch
from ppflow_jax.convert.load import load_state
from ppflow_jax.errors import InputError
from ppflow_jax.flow.guidance import Cfg
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.conditions import Channels, Scalar, null, sinusoid
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.network import init_params, make_apply
from ppflow_jax.pyramid import PPFLOW3, SIT
from ppflow_jax.systems.registry import CONDITIONS, take_conditions
from tests.systems.checks import compiled, random_params

PLAIN = ModelConfig(PPFLOW3, latent_size=8, channels=3, width=16, depth=2, heads=2, num_classes=5)
LOW, MASK, SCALE = Channels("low", 2), Channels("mask", 1, drop=0.1), Scalar("w", features=8)
MODEL = dataclasses.replace(PLAIN, conditions=(LOW, MASK, SCALE))
B, STAGES = 3, range(3)


def told(key=1):
    keys = jax.random.split(jax.random.key(key), 3)
    low, mask = (jax.random.normal(k, (B, 8, 8, c.channels)) for k, c in zip(keys, (LOW, MASK)))
    return {
        "label": jnp.array([1, 5, 0]),
        "low": low,
        "mask": mask,
        "w": jax.random.uniform(keys[2], (B,), maxval=8.0),
    }


X, T = jax.random.normal(jax.random.key(0), (B, 8, 8, 3)), jnp.float32([0.2, 0.4, 0.9])


def test_every_kind_is_here():
    """What the network makes of its own tokens is in tests/systems/test_self_conditioning.py."""
    given = {kind for kind in CONDITIONS.values() if kind.enters != "blocks"}
    assert {type(c) for c in MODEL.conditions} == given


def test_fresh_conditions_change_no_bit_and_base_leaves_start_as_without_them():
    plain, fresh = (init_params(m, jax.random.key(3)) for m in (PLAIN, MODEL))
    own = fresh.pop("conditions")
    jax.tree.map(np.testing.assert_array_equal, plain, fresh)
    assert not any(leaf.any() for leaf in jax.tree.leaves(own))
    params = random_params(PLAIN)
    for stage in STAGES:
        y = told()
        ours = compiled(MODEL)(params | {"conditions": own}, X, T, y, stage)
        np.testing.assert_array_equal(ours, compiled(PLAIN)(params, X, T, y["label"], stage))


def test_a_label_alone_may_be_a_dict():
    params, y = random_params(PLAIN), told()["label"]
    text = lambda y: str(jax.make_jaxpr(lambda y: make_apply(PLAIN)(params, X, T, y, 0))(y))
    assert text({"label": y}) == text(y)


def test_channels_are_a_wider_patch_projection_of_every_stage():
    """Beside the latent, as arXiv 2112.10752 has them."""
    model = dataclasses.replace(PLAIN, conditions=(LOW,))
    wide = dataclasses.replace(PLAIN, channels=5)
    params, y = random_params(model), told()
    own, base = params["conditions"]["low"], {k: v for k, v in params.items() if k != "conditions"}
    joined = {}
    for stage, s in enumerate(PPFLOW3.stages):
        area = math.prod(s.patch)
        kernels = [
            np.asarray(k).reshape(area, -1, 16)
            for k in (base["patchify"][stage]["kernel"], own[stage]["kernel"])
        ]
        kernel = np.concatenate(kernels, axis=1).reshape(-1, 16)
        joined[stage] = base["patchify"][stage] | {"kernel": kernel}
        out = base["unpatchify"][stage]
        halves = [
            np.pad(np.asarray(v).reshape(-1, area, 2, 3), [(0, 0)] * 3 + [(0, 2)])
            for v in (out["kernel"], out["bias"][None])
        ]
        kernel, bias = (half.reshape(len(half), -1) for half in halves)
        joined[stage] |= {"out": {"kernel": kernel, "bias": bias[0]}}
    other = base | {
        "patchify": {i: {k: v for k, v in p.items() if k != "out"} for i, p in joined.items()},
        "unpatchify": {i: p["out"] for i, p in joined.items()},
    }
    for stage in STAGES:
        ours = compiled(model)(params, X, T, {k: y[k] for k in ("label", "low")}, stage)
        x = jnp.concatenate([X, y["low"]], axis=-1)
        theirs = compiled(wide)(other, x, T, y["label"], stage)[..., :3]
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_every_condition_shows_and_only_in_its_own_image():
    params, y = random_params(MODEL), told()
    for stage in STAGES:
        before = compiled(MODEL)(params, X, T, y, stage)
        for name in ("low", "mask", "w"):
            changed = y | {name: y[name].at[1].add(0.5)}
            after = compiled(MODEL)(params, X, T, changed, stage)
            difference = np.abs(after - before).max(axis=(1, 2, 3))
            assert difference[1] > 1e-3 and difference[[0, 2]].max() < 1e-5, (name, difference)


def test_stages_in_one_pass_are_each_alone():
    params, ys = random_params(MODEL), tuple(told(k) for k in STAGES)
    outputs = compiled(MODEL)(params, (X,) * 3, (T,) * 3, ys, (0, 1, 2))
    for stage in STAGES:
        alone = compiled(MODEL)(params, X, T, ys[stage], stage)
        np.testing.assert_allclose(outputs[stage].prediction, alone, atol=2e-6)


def test_leaves_get_gradients():
    params, y = random_params(MODEL), told()
    params["conditions"] = jax.tree.map(jnp.zeros_like, params["conditions"])
    apply = make_apply(MODEL)
    loss = lambda own: jnp.sum(apply(params | {"conditions": own}, X, T, y, 1) ** 2)
    gradient = jax.jit(jax.grad(loss))(params["conditions"])
    assert all(np.abs(gradient[c][1]["kernel"]).max() > 0 for c in ("low", "mask"))
    assert np.abs(gradient["w"]["kernel"]).max() > 0


@pytest.mark.parametrize(("features", "scale"), [(256, 1000.0), (7, 1000.0), (16, 1.0)])
def test_the_sinusoid_is_exact_where_float32_angles_are_not(features, scale):
    w = np.float32([0, 0.1, 0.25, 1, 3.999, 7.5, 13.9, 14, 31.7, -2.3])
    half = features // 2
    angles = scale * np.float64(w)[:, None] * 10000 ** (-np.arange(half) / (half - 1))
    odd = np.zeros((len(w), features % 2))
    expected = np.concatenate([np.sin(angles), np.cos(angles), odd], axis=1)
    ours = jax.jit(lambda w: sinusoid(w, features, scale))(w)
    np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_null_drops_what_training_drops():
    y = told()
    nothing = null(MODEL.conditions, 5, y)
    assert (nothing["label"] == 5).all() and not nothing["mask"].any()
    assert nothing["low"] is y["low"] and nothing["w"] is y["w"]


def test_guidance_keeps_what_is_never_dropped():
    params, y, apply = random_params(MODEL), told(), make_apply(MODEL)
    predict = lambda x, t, y: apply(params, x, t, y, 0)
    guided = jax.jit(lambda y: Cfg(5, 0, MODEL.conditions)(predict, None, X, T, y, 3.0))(y)
    nothing = y | {"label": jnp.full(B, 5), "mask": jnp.zeros_like(y["mask"])}
    good, bad = (compiled(MODEL)(params, X, T, each, 0) for each in (y, nothing))
    np.testing.assert_allclose(guided, bad + 3 * (good - bad), rtol=1e-4, atol=1e-3)


def test_an_adaptive_sampler_takes_them():
    model, y = dataclasses.replace(MODEL, pyramid=SIT, depth=1), told()
    small = jax.tree.map(lambda leaf: 0.3 * leaf, random_params(model))
    sampler = Sampler(make_apply(model), model, Flow(), SamplerConfig("dopri5"))
    both = sampler(small, X, y)
    swapped = jax.tree.map(lambda leaf: leaf[::-1], y)
    np.testing.assert_allclose(sampler(small, X[::-1], swapped)[::-1], both, rtol=1e-3, atol=1e-3)
    others = y | {"low": y["low"] + 1}
    assert np.abs(sampler(small, X, others) - both).max() > 1e-3


def test_cards_keep_them_and_older_ones_have_none():
    card = Card(MODEL, Flow(), "pixels")
    values = json.loads(json.dumps(card.to_json()))
    assert Card.from_json(values) == card
    older = Card(PLAIN, Flow(), "pixels").to_json()
    assert "conditions" not in older["model"]
    assert Card.from_json(older).model.conditions == ()
    assert "conditions: none -> " in Card(PLAIN, Flow(), "pixels").differences(card)


def test_pytorch_names_come_back_with_the_same_bits():
    params = jax.tree.map(np.asarray, random_params(MODEL))
    state = to_torch(MODEL, params)
    assert state["conditions.low.1.weight"].shape == (16, 8 * 2)
    assert state["conditions.w.weight"].shape == (256, 8)
    found = find_config(state, "ppflow", heads=2, latent_size=8)
    assert found == dataclasses.replace(MODEL, conditions=(LOW, Channels("mask", 1), SCALE))
    jax.tree.map(np.testing.assert_array_equal, load_state(MODEL, state).params, params)


def test_flops_count_their_projections():
    extra = forward_flops(MODEL, 0) - forward_flops(PLAIN, 0)
    assert extra == 2 * 64 * 3 * 16 + 2 * 8 * 256


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (("picture:name=a",), "unknown condition 'picture': one of channels, scalar"),
        (("channels:channels=4",), "has no name: write channels:name=..."),
        (("channels:name=low,size=4",), "unknown key 'size'"),
        (("channels:name=low,drop=1",), "drop at least 0 and below 1"),
        (("channels:name=label",), "name='label' is no name, or that of something else"),
        (("scalar:name=items",), "name='items'"),
        (("scalar:name=w,features=3",), "features must be at least 4"),
        ("channels:name=low", "give a tuple of texts"),
    ],
)
def test_wrong_texts_are_refused(texts, words):
    with pytest.raises(InputError, match=words.replace(".", r"\.").replace("(", r"\(")):
        take_conditions({"conditions": texts})


def test_what_is_given_must_be_what_the_model_takes():
    params, y = random_params(MODEL), told()
    for wrong in (y["label"], {k: y[k] for k in ("label", "low")}, y | {"more": y["w"]}):
        with pytest.raises(InputError, match="the model's conditions are low, mask, w, the net"):
            make_apply(MODEL)(params, X, T, wrong, 0)
    with pytest.raises(InputError, match="conditions are none, the network was given low"):
        make_apply(PLAIN)(random_params(PLAIN), X, T, {k: y[k] for k in ("label", "low")}, 0)
    with pytest.raises(InputError, match="two conditions are called low"):
        dataclasses.replace(PLAIN, conditions=(LOW, Channels("low", 1)))
