from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.errors import InputError
from ppflow_jax.flow.cost import sampling_flops
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.generate.explain import explain
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.layers import Block
from ppflow_jax.models.network import make_apply
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated
from ppflow_jax.systems.ras import Ras, RasConfig, left_out, spread
from tests.systems import parity_ras
from tests.systems.checks import random_params, within
from tests.systems.parity_ras import PATCH
from tests.systems_parity import Reference

REFERENCE = Path(__file__).parents[1] / "reference" / "systems" / "ras" / "ras.npz"
MODEL = ModelConfig(PPFLOW2, latent_size=8, channels=2, width=8, depth=2, heads=2, num_classes=4)
NOISE = jax.random.normal(jax.random.key(3), (2, *MODEL.shape))
LABELS = jnp.arange(2)
CONFIG = SamplerConfig("euler", 20, cfg=(1.0, 2.0))
TEXT = "ras,ras.share=0.4,ras.high=0.6,ras.starvation=0.3,ras.warmup=2,ras.interval=6"


@pytest.fixture(scope="module")
def params():
    # Velocities of random weights are large: smaller ones keep the trajectory bounded
    return jax.tree.map(lambda leaf: leaf / 2, random_params(MODEL))


def sampler(text, config=CONFIG, model=MODEL):
    accelerate = AccelerateConfig.parse(text.replace("ras,", "ras=std,"))
    segments = accelerated(config, model, Flow(), accelerate)
    return Sampler(make_apply(model), model, Flow(), config, segments=segments)


def test_the_choice_is_that_of_the_public_code():
    found = list(parity_ras.rows(Reference(REFERENCE)))
    assert len(found) == 7
    within(found)


def test_the_whole_is_what_a_masked_network_does(params):
    """Every token through every block at every step, and what is not computed thrown away."""
    ours = sampler(TEXT)
    method = ours.segments[1].method
    assert ours.segments[0].method is None and isinstance(method, Ras)
    assert method.counts == (4, 5)
    with jax.default_matmul_precision("highest"):
        found = np.asarray(ours(params, NOISE, LABELS, trajectory=True))
        x, theirs = found[10], []
        state = Masked(params, method)
        for i in range(10, 20):
            full = ours.segments[1].full[i - 10]
            assert full == (i - 10 in (0, 1, 7))
            v = state.velocity(x, i / 20, full, i + 1 - 10 not in (1, 7, 10))
            x = np.float32(x + v / 20)
            theirs.append(x)
    error = np.abs(found[11:] - np.stack(theirs)).max()
    plain = np.asarray(sampler("exact")(params, NOISE, LABELS))
    assert error < 2e-5 < 1e-3 < np.abs(found[-1] - plain).max()


class Masked:
    """Independent of `systems.ras` but for the names of its settings."""

    def __init__(self, params, method):
        self.params, self.method = params, method
        self.kept, self.last = {}, None
        self.out = np.zeros((2, 16), bool)
        self.times = np.zeros((2, 16))

    def trunk(self, out, blocks, h, c):
        for i in range(MODEL.depth):
            block = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)
            h = self.block(i, block, h, c, out)
        return h, None

    def block(self, i, block: Block, h, c, out):
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)
        norm = lambda h: (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)
        z = norm(h) * (1 + scale1[:, None]) + shift1[:, None]
        q, k, v = block.attention.project(z)
        if i in self.kept:
            k, v = (jnp.where(out[:, :, None, None], a, b) for a, b in zip(self.kept[i], (k, v)))
        self.kept[i] = k, v
        logits = jnp.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(q.shape[-1])
        a = jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(logits), v).reshape(h.shape)
        h = h + gate1[:, None] * block.attention.out(a)
        z = norm(h) * (1 + scale2[:, None]) + shift2[:, None]
        return h + gate2[:, None] * block.mlp(z)

    def velocity(self, x, t, full, cheap_next):
        out = self.out & (not full)
        both = np.repeat(out, 2, axis=0)
        labels = np.stack([np.arange(2), np.full(2, MODEL.null_label)], 1).ravel()
        trunk = lambda *given: self.trunk(both, *given)
        xs, ts = jnp.repeat(jnp.asarray(x), 2, axis=0), jnp.full(4, t, jnp.float32)
        value, _ = make_apply(MODEL)(self.params, xs, ts, jnp.asarray(labels), 1, trunk)
        v = np.asarray(value[1::2] + 2 * (value[::2] - value[1::2]))
        pixels = np.kron(out.reshape(2, 4, 4), np.ones((1, 2, 2))) > 0
        if self.last is not None:
            v = np.where(pixels[..., None], self.last, v)
        self.last = v
        size = v.std(-1, ddof=1).reshape(2, 4, 2, 4, 2).mean((2, 4)).reshape(2, 16)
        factor = np.exp(0.3 * self.times)
        self.out = np.zeros_like(self.out)
        for row, (low, high) in enumerate(zip(size * factor, size / factor)):
            smallest = np.argsort(low)[:4]
            high[smallest] = -1
            self.out[row, [*smallest, *np.argsort(high)[-5:]]] = True
        if cheap_next:
            self.times += self.out
        return v


@pytest.mark.parametrize("high", [0.0, 1.0])
def test_no_token_is_left_out_for_ever(high):
    """With the factor of the release on both ends, those with the largest values are."""
    config = RasConfig("norm", high=high, starvation=0.5)
    velocity = jnp.float32(np.linspace(1, 3, 16).reshape(1, 4, 4, 1))
    method = Ras("norm", config.counts(16), config.starvation, (4, 4))
    times, counted = jnp.zeros((1, 16), int), np.zeros(16, int)
    for _ in range(20):
        out, times = method.choose(velocity, times, True)
        counted += ~np.asarray(out[0])
    assert counted.min() > 0
    value, away, times = jnp.log(velocity.reshape(1, 16)), [], np.zeros((1, 16))
    for _ in range(20):
        out = left_out(*[value + 0.5 * times] * 2, config.counts(16))
        times += out
        away.append(np.asarray(out[0]))
    assert np.all(away, axis=0).any() == (high == 1)


def test_as_many_are_computed_as_are_asked_for():
    """The release drops 31 of 64 tokens where half of them are to be, and fails with high=0."""
    assert RasConfig(high=0.3).counts(64) == (23, 9)
    values = jnp.float32(np.random.default_rng(0).normal(size=(5, 64)))
    for counts in ((23, 9), (32, 0), (0, 32), (0, 0), (40, 24)):
        assert np.all(np.asarray(left_out(values, -values, counts)).sum(1) == sum(counts))
    assert RasConfig(share=0.001).counts(16) == (0, 15)


def test_one_image_does_not_see_the_choice_of_another(params):
    ours = sampler(TEXT)
    both = np.asarray(ours(params, NOISE, LABELS))
    alone = np.asarray(ours(params, NOISE[1:], LABELS[1:]))
    np.testing.assert_allclose(both[1:], alone, atol=2e-5)


def test_every_evaluation_of_heun_has_a_choice_of_its_own(params):
    ours = sampler(TEXT, SamplerConfig("heun", 20, cfg=(2.0,)))
    memory = ours.memory_of(ours.segments[1], params, None, NOISE, LABELS)
    assert len(memory) == 2 and memory[1]["velocity"]["out"].shape == (2, 16)
    assert memory[0]["velocity"]["kept"]["model"][0].shape == (2, 4, 16, 2, 4)
    assert np.isfinite(ours(params, NOISE, LABELS)).all()


def test_what_it_costs():
    ours = sampler(TEXT)
    d, depth, n, a = MODEL.width, MODEL.depth, 16, 7
    full, method = forward_flops(MODEL, 1), ours.segments[1].method
    assert method.flops(MODEL, 1, True, None) == full
    token = 8 * d * d + 16 * d * d  # projections and MLP
    saved = depth * ((n - a) * token + 4 * n * (n - a) * d)
    assert method.flops(MODEL, 1, False, None) == full - saved
    plain = sampler("exact")
    difference = sampling_flops(MODEL, plain.segments) - sampling_flops(MODEL, ours.segments)
    assert difference == 2 * 7 * saved  # guided
    assert " ras " in explain(ours, MODEL, 4).splitlines()[0]


def test_one_channel_is_compared_by_its_size():
    one = replace(MODEL, channels=1)
    with pytest.raises(InputError, match="give ras=norm"):
        sampler(TEXT, model=one)
    velocity = jnp.ones((1, 4, 4, 1)).at[0, :2, :2].set(-3)
    np.testing.assert_allclose(spread(velocity, PATCH, "norm"), [[3, 1, 1, 1]])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ras=size", "unknown ras 'size': one of std, norm"),
        ("ras.share=0", "share 0.0 must be in"),
        ("ras.high=1.5", "high 1.5"),
        ("ras.starvation=-1", "at least 0, got -1"),
        ("ras.interval=0", "interval 0 must be at least 1"),
        ("ras.stages=2", "ras.stages has 2: the model has 2"),
        ("ras=std,merge=sdtm", "stage 1 cannot have both merged and ras steps: choose one, or"),
        ("ras=std,forecast.interval=2", "cannot have both forecast and ras"),
    ],
)
def test_what_is_wrong_is_said(text, words):
    with pytest.raises(InputError, match=words):
        sampler(text)


def test_stages_share_a_plan_with_others(params):
    ours = sampler(TEXT + ",forecast.interval=3/1")
    assert [s.method.name for s in ours.segments] == ["forecast", "ras"]
    assert np.isfinite(ours(params, NOISE, LABELS)).all()
