"""The table of pairs is true: what works runs, by stages where it says so; the rest is refused."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.api.plans import plan_of
from ppflow_jax.checkpoints.card import Card
from ppflow_jax.checkpoints.weights import Weights
from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.generate.plan import make_plan
from ppflow_jax.models.conditions import GUIDANCE, INTERVAL, Channels, Scalar
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import make_apply
from ppflow_jax.models.parts import DIT, BlockSpec
from ppflow_jax.models.students import parse
from ppflow_jax.pyramid import PPFLOW2, SIT, Pyramid
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated
from ppflow_jax.systems.composition import ENGINES, METHODS, REFUSED, STAGES, WORKS, pairs
from ppflow_jax.systems.ddt import DDT
from ppflow_jax.systems.ddt_blocks import RopeAttention, SwiGlu
from ppflow_jax.systems.dense2moe import Dense2MoE
from ppflow_jax.systems.dico_network import DiCoNetwork
from ppflow_jax.systems.dimr import TdLn
from ppflow_jax.systems.dydit import DyDiT
from ppflow_jax.systems.linfusion import LinFusion
from ppflow_jax.systems.mixture_of_blocks import MixtureOfBlocks
from ppflow_jax.systems.moe import MoE
from ppflow_jax.systems.self_conditioning import SelfCondition
from ppflow_jax.systems.switch import Switch
from tests.systems.checks import random_params

MODEL = ModelConfig(SIT, latent_size=8, channels=2, width=8, depth=1, heads=2, num_classes=4)
STAGED = replace(MODEL, pyramid=PPFLOW2)
ROUTERS = BlockSpec(wrap=DyDiT())
EULER = SamplerConfig("euler", 3)
TEXTS = {
    "forecast": "forecast.interval=2,forecast.warmup=1",
    "merge": "merge.ratio=0.3,merge.deviation=0,merge.round_to=1",
    "ras": "ras.warmup=1,ras.interval=2",
    "rettention": "rettention.warmup=1,rettention.interval=2",
    "width": "width=2",
    "experts": "experts=0",
    "mob": "mob=true",
}
# The same methods in the coarse stage
COARSE = {
    "forecast": "forecast.interval=2/1,forecast.warmup=1",
    **{name: f"{TEXTS[name]},{name}.stages=0" for name in ("merge", "ras", "rettention")},
}
COARSE["experts"] = "experts=0/2"
FINE = TEXTS | {
    "experts": "experts=2/0",
    "mob": "mob=true,mob.stages=1",
    "width": "width=2,width.stages=1",
}
CONFIGS = {
    "cfg": replace(EULER, cfg=(2.0,)),
    "interval": replace(EULER, steps=6, cfg=(2.0,), cfg_interval=(0.5, 1.0)),
    "weak": replace(EULER, cfg=(2.0,)),
    "told": replace(EULER, cfg=(2.0,)),
    "meanflow": replace(EULER, solver="meanflow"),
    "multistep": replace(EULER, solver="ab2"),
    "sde": replace(EULER, solver="sde-euler"),
    "dopri5": replace(EULER, solver="dopri5"),
    "keep": replace(EULER, keep="steps"),
}
SLICES = Dense2MoE(3, 2, gate="ones")
MODELS = {
    "experts": replace(MODEL, block=BlockSpec(ffn=SLICES)),
    "told": replace(MODEL, conditions=(Scalar(GUIDANCE),)),
    "meanflow": replace(MODEL, conditions=(Scalar(INTERVAL),)),
    "moe": replace(MODEL, block=BlockSpec(ffn=MoE(experts=2, top_k=1))),
    "switch": replace(MODEL, block=BlockSpec(wrap=Switch(experts=2, top_k=1))),
    "tdln": replace(MODEL, block=BlockSpec(norm=TdLn())),
    "selfcond": replace(MODEL, depth=2, conditions=(SelfCondition("middle"),)),
    "students": replace(MODEL, depth=3, students=parse("0:1-2")),
    "mixer": replace(MODEL, block=BlockSpec(mixer=LinFusion())),
    "ddt": replace(MODEL, block=BlockSpec(SwiGlu(), mixer=RopeAttention()), network=DDT(16, 1, 2)),
    "dico": replace(
        MODEL, pyramid=Pyramid.parse("1x1@1"), depth=5, heads=1, network=DiCoNetwork((1,) * 5)
    ),
    "dydit": replace(MODEL, block=ROUTERS),
    "width": replace(MODEL, block=ROUTERS),
    "keep": replace(MODEL, conditions=(Channels("known", channels=3, drop=0.0),)),
    "stages": STAGED,
    "mob": replace(MODEL, depth=2, block=BlockSpec(wrap=MixtureOfBlocks())),
}
CONFIGS["stages"] = replace(EULER, steps=6)
TABLE = {(pair.first, pair.second): pair for pair in pairs()}


def model_of(other, engines=()):
    """With what engines are for, where the other method leaves room for it."""
    model = MODELS.get(other, MODEL)
    taken = model.block.wrap is not None or model.network is not None
    if "experts" in engines and other not in ("dydit", "ddt", "dico"):
        model = replace(model, block=replace(model.block, ffn=SLICES))
    if "mob" in engines and not taken:
        model = replace(model, depth=2, block=replace(model.block, wrap=MixtureOfBlocks()))
    if "width" in engines and model.block == DIT and model.has_trunk:
        model = replace(model, block=ROUTERS)
    return model


def sampler(text, other, engines=()):
    if other == "plan":
        return plan_of(object.__new__(Weights), "a.json", 50, "heun", None, text, None, {})
    model, config = model_of(other, engines), CONFIGS.get(other, EULER)
    added = AccelerateConfig.parse(text)
    params = halved(model) if "width" in engines else None
    if other == "weak" and "width" in engines:
        weights = Weights(Card(model, Flow(), "latents"), Path("model"), "ema", lambda: params)
        make_plan(weights.card, config, added, weights, weights)
    segments = accelerated(config, model, Flow(), added, params)
    weak = make_apply(MODEL) if other == "weak" else None
    return Sampler(make_apply(model), model, Flow(), config, segments=segments, weak=weak)


def halved(model):
    return jax.tree.map(lambda leaf: leaf / 2, random_params(model))


@functools.cache
def sampled(text, other, engines=()):
    ours, params = sampler(text, other, engines), halved(model_of(other, engines))
    noise, labels = jax.random.normal(jax.random.key(1), (2, *MODEL.shape)), jnp.arange(2)
    cond = labels
    if other == "keep":
        known = jnp.zeros((2, 8, 8, 3)).at[:, :4, :, 0].set(1)  # a mask, and zeros
        cond = {"label": labels, "known": known}
    weak = jax.tree.map(lambda leaf: leaf / 4, random_params(MODEL)) if other == "weak" else None
    keys = jax.random.split(jax.random.key(2), 2) if other == "sde" else None
    return np.asarray(ours(params, noise, cond, keys, weak=weak))


def test_the_table_has_every_pair_once():
    n, k = len(METHODS), len(ENGINES)
    assert len(TABLE) == len(pairs()) == k * (k - 1) // 2 + k * (n - k)
    assert {v.verdict for v in TABLE.values()} == {WORKS, STAGES, REFUSED}
    assert all(pair.reason for pair in TABLE.values() if pair.verdict != WORKS)


def each(verdict, quick=None):
    """Pairs with this verdict; those with none of the names `quick` are for `make long`."""
    given = []
    for pair in (p for p in TABLE.values() if p.verdict == verdict):
        marks = () if quick is None or pair.second in quick else (pytest.mark.long,)
        given.append(pytest.param(pair, marks=marks, id=f"{pair.first}-{pair.second}"))
    return pytest.mark.parametrize("pair", given)


@each(REFUSED)
def test_what_is_refused_says_why(pair):
    with pytest.raises(InputError, match=pair.reason):
        sampler(TEXTS[pair.first], pair.second, (pair.first,))


@each(STAGES, quick=("rettention",))
def test_two_engines_share_a_plan_by_stages(pair):
    fine, engines = FINE[pair.second], (pair.first, pair.second)
    with pytest.raises(InputError, match=pair.reason):
        sampler(f"{TEXTS[pair.first]},{fine}", "stages", engines)
    found = sampled(f"{COARSE[pair.first]},{fine}", "stages", engines)
    alone = sampled(fine, "stages", engines)
    assert np.isfinite(found).all() and np.abs(found - alone).max() > 1e-7


@each(WORKS, quick=("cfg", "multistep", "ddt"))
def test_what_works_runs(pair):
    """And changes something: the engine is at work beside the other method.

    Slices, and blocks that count for nothing, change nothing.
    """
    engines = (pair.first,)
    found, plain = (sampled(text, pair.second, engines) for text in (TEXTS[pair.first], "exact"))
    if pair.first == "width":
        segments = sampler(TEXTS["width"], pair.second, engines).segments
        assert "sliced" in {s.method.name for s in segments if s.method}
    if pair.first in ("width", "mob"):
        np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())
        return
    assert np.isfinite(found).all() and np.abs(found - plain).max() > 1e-7
    assert np.abs(found - plain).max() < np.abs(plain).max()
