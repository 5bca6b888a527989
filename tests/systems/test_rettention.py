from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.network import make_apply
from ppflow_jax.pyramid import PPFLOW2
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated
from ppflow_jax.systems.rettention import Rettention, band_attention, full_attention, in_band
from tests.systems import parity_rettention
from tests.systems.checks import random_params, within
from tests.systems_parity import Reference

REFERENCE = Path(__file__).parents[1] / "reference" / "systems" / "rettention" / "rettention.npz"
MODEL = ModelConfig(PPFLOW2, latent_size=16, channels=2, width=8, depth=2, heads=2, num_classes=4)
NOISE = jax.random.normal(jax.random.key(3), (2, *MODEL.shape))
LABELS = jnp.arange(2)
CONFIG = SamplerConfig("euler", 12, cfg=(1.0, 2.0))
TEXT = "rettention=0.3,rettention.drift=0.4,rettention.warmup=1,rettention.interval=4"


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda leaf: leaf / 2, random_params(MODEL))


def sampler(text, config=CONFIG, model=MODEL):
    segments = accelerated(config, model, Flow(), AccelerateConfig.parse(text))
    return Sampler(make_apply(model), model, Flow(), config, segments=segments)


def random_heads(tokens=37, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.float32(rng.normal(size=(2, tokens, 3, 5))) for _ in range(3)]


def test_attention_is_that_of_the_public_code():
    with jax.default_matmul_precision("highest"):
        found = list(parity_rettention.rows(Reference(REFERENCE)))
    assert len(found) == 11
    within(found)


@pytest.mark.parametrize(("tokens", "half"), [(37, 5), (37, 20), (37, 0), (16, 4), (100, 12)])
def test_a_cheap_step_with_the_same_tokens_is_the_full_one(tokens, half):
    """Blocks of keys and queries of any size see the band and nothing else."""
    q, k, v = random_heads(tokens)
    with jax.default_matmul_precision("highest"):
        whole, (rho, outside) = full_attention(q, k, v, half)
        again = band_attention(q, k, v, half, rho, outside)
        alone = band_attention(q, k, v, half, jnp.ones_like(rho), jnp.zeros_like(outside))
    np.testing.assert_allclose(whole, jax.nn.dot_product_attention(q, k, v), atol=1e-5)
    np.testing.assert_allclose(again, whole, atol=1e-5)
    mask = jnp.asarray(in_band(tokens, half))[None, None]
    np.testing.assert_allclose(alone, jax.nn.dot_product_attention(q, k, v, mask=mask), atol=1e-5)
    if half >= tokens - 1:
        np.testing.assert_allclose(rho, 1, atol=1e-6)


def test_the_whole_is_what_a_masked_network_does(params):
    """All scores at every step, in the release's terms: rho, and a residual after projection."""
    ours = sampler(TEXT)
    assert ours.segments[0].method is None and ours.segments[1].method == Rettention(9)
    assert ours.segments[1].full == (True, False, False, False, True, False)
    with jax.default_matmul_precision("highest"):
        found = np.asarray(ours(params, NOISE, LABELS, trajectory=True))
        x, kept, theirs = found[6], {}, []
        labels = np.stack([np.arange(2), np.full(2, MODEL.null_label)], 1).ravel()
        for i, since in zip(range(6, 12), (0, 1, 2, 3, 0, 1)):
            trunk = lambda *given, since=since: masked(kept, since, *given)
            xs, ts = jnp.repeat(jnp.asarray(x), 2, axis=0), jnp.full(4, i / 12, jnp.float32)
            value, _ = make_apply(MODEL)(params, xs, ts, jnp.asarray(labels), 1, trunk)
            x = np.float32(x + (value[1::2] + 2 * (value[::2] - value[1::2])) / 12)
            theirs.append(x)
    error = np.abs(found[7:] - np.stack(theirs)).max()
    plain = np.asarray(sampler("exact")(params, NOISE, LABELS))
    assert error < 5e-5 < 1e-3 < np.abs(found[-1] - plain).max()
    grown = [np.asarray(kept[i][0] + 0.8) for i in range(2)]
    assert np.max(grown) > 1  # what the release would take


def masked(kept, since, blocks, h, c):
    norm = lambda h: (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)
    i = np.arange(64)
    band = (np.abs(i[:, None] - i[None]) <= 9)[None, None]
    for layer in range(MODEL.depth):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks)
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)
        q, k, v = block.attention.project(norm(h) * (1 + scale1[:, None]) + shift1[:, None])
        logits = jnp.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(q.shape[-1])
        values = lambda p, v=v: jnp.einsum("bhqk,bkhe->bqhe", p, v).reshape(*v.shape[:2], -1)
        local = jax.nn.softmax(jnp.where(band, logits, -1e5))
        if since == 0:
            p = jax.nn.softmax(logits)
            rho = jnp.sum(p * band, axis=-1, keepdims=True)
            out = block.attention.out(values(p))
            kept[layer] = rho, out - block.attention.out(values(rho * local))
        else:
            rho, residual = kept[layer]
            rho = jnp.minimum(rho + 0.4 * (since - 1), 1)
            out = block.attention.out(values(rho * local)) + residual
        h = h + gate1[:, None] * out
        z = norm(h) * (1 + scale2[:, None]) + shift2[:, None]
        h = h + gate2[:, None] * block.mlp(z)
    return h, None


def test_what_it_costs():
    ours = sampler(TEXT)
    method, d, n = ours.segments[1].method, MODEL.width, 64
    plain = forward_flops(MODEL, 1)
    assert method.flops(MODEL, 1, True, None) == plain + MODEL.depth * 2 * n * n * d
    # 4 blocks of 16 queries, each with 16 + 2 * 9 keys
    saved = MODEL.depth * 4 * d * (n * n - 64 * 34)
    assert method.flops(MODEL, 1, False, None) == plain - saved


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rettention=0", "rettention 0.0 must be in"),
        ("rettention.drift=2", "drift 2.0 in"),
        ("rettention.warmup=0", "warmup 0 and interval 5 must be at least 1"),
        ("rettention.stages=3", "rettention.stages has 3: the model has 2"),
        ("rettention=0.2,ras=std", "stage 1 cannot have both ras and rettention steps"),
    ],
)
def test_what_is_wrong_is_said(text, words):
    with pytest.raises(InputError, match=words):
        sampler(text, SamplerConfig("euler", 40))
