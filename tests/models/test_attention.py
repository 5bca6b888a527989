"""The programs of attention give the same numbers, and the kernel is used where it can be."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.devices.layout import Layout
from ppflow_jax.devices.programs import Programs
from ppflow_jax.devices.sharding import layout, make_mesh
from ppflow_jax.models import attention
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import abstract_params, make_apply
from ppflow_jax.pyramid import PPFLOW2

# 64 and 256 tokens
SMALL = ModelConfig(PPFLOW2, latent_size=32, channels=1, width=16, depth=2, heads=2, num_classes=5)


def arrays(key, count, shape, dtype=jnp.float32):
    return [jax.random.normal(k, shape).astype(dtype) for k in jax.random.split(key, count)]


def by_definition(q, k, v):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(q.shape[-1])
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhe->bqhe", p / p.sum(-1, keepdims=True), v)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernel runs here, from 256 tokens on; the token counts of its calls."""
    calls = []

    def splash(q, k, v):
        calls.append(q.shape)
        return kernel(q, k, v)

    kernel = functools.partial(attention.splash, interpret=True)
    monkeypatch.setattr(attention, "splash", splash)
    monkeypatch.setattr(attention, "SPLASH_TOKENS", 256)
    return calls


# one block, several that are smaller than the largest, heads of S to L and of XL
@pytest.mark.parametrize(("tokens", "head"), [(128, 64), (640, 8), (256, 72)])
def test_splash_is_attention_and_its_gradient(tokens, head, key):
    q, k, v, g = arrays(key, 4, (2, tokens, 2, head))

    def run(f):
        out, backward = jax.vjp(f, q, k, v)
        return out, *backward(g)

    ours = run(functools.partial(attention.splash, interpret=True))
    np.testing.assert_allclose(ours[0], by_definition(q, k, v), atol=3e-6)
    xla = run(functools.partial(jax.nn.dot_product_attention, implementation="xla"))
    for a, b in zip(ours, xla):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_splash_keeps_the_dtype(key):
    q, k, v = arrays(key, 3, (1, 128, 2, 8), jnp.bfloat16)
    out = attention.splash(q, k, v, interpret=True)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), by_definition(q, k, v), atol=2e-2)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_deferred_division_changes_nothing(weighted, key):
    q, k, v, g = arrays(key, 4, (2, 12, 3, 8))
    weight = jnp.log(jnp.arange(1.0, 25)).reshape(2, 1, 1, 12) if weighted else None

    def run(name):
        out, backward = jax.vjp(lambda *qkv: attention.attend(name, *qkv, weight), q, k, v)
        return out, *backward(g)

    for a, b in zip(run("deferred"), run("xla")):
        np.testing.assert_allclose(a, b, atol=5e-6)


@pytest.mark.parametrize(
    ("tokens", "weighted", "taken"),
    [(256, False, True), (128, False, False), (320, False, False), (256, True, False)],
)
def test_what_splash_cannot_take_xla_does(tokens, weighted, taken, key, interpreted):
    q, k, v = arrays(key, 3, (1, tokens, 2, 8))
    weight = jnp.zeros((1, 1, 1, tokens)) if weighted else None
    out = attention.attend(
        "splash", q, k, v, weight, layout(make_mesh(devices=jax.devices()[:1])).heads
    )
    assert bool(interpreted) == taken
    np.testing.assert_allclose(out, by_definition(q, k, v), atol=3e-6)


def test_without_a_mesh_a_kernel_needs_a_device_of_its_own(key, interpreted, monkeypatch):
    """The compiler would have to cut it, which it cannot."""
    q, k, v = arrays(key, 3, (8, 256, 2, 8))
    attend = functools.partial(attention.attend, "splash", per_device=Layout().heads)
    attend(q, k, v)
    assert not interpreted
    mesh, rows = make_mesh(), jax.sharding.PartitionSpec("data")
    jax.shard_map(attend, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(q, k, v)
    assert interpreted == [(1, 256, 2, 8)]
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    attend(q, k, v)
    assert interpreted[1:] == [(8, 256, 2, 8)]


def noisy(config, key):
    leaves, tree = jax.tree.flatten(abstract_params(config))
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([0.2 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves)])


def gradient(key, apply):
    x, t, y = jax.random.normal(key, (4, 32, 32, 1)), jnp.full(4, 0.8), jnp.arange(4)
    of = jax.jit(jax.grad(lambda p: jnp.sum(apply(p, x, t, y, 1) ** 2)))
    return of(noisy(SMALL, key))


@pytest.fixture(scope="module")
def plain():
    return gradient(jax.random.key(0), make_apply(SMALL, programs=Programs()))


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_a_network_with_splash_on_a_mesh(remat, key, plain, interpreted):
    """Batch and heads are split, and gradients are those of the plain network."""
    mesh, splash = make_mesh(2, 2, 2), Programs(attention="splash")
    kernel = gradient(key, make_apply(SMALL, programs=splash, remat=remat, layout=layout(mesh)))
    assert set(interpreted) == {(1, 256, 1, 8)}
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(kernel)):
        np.testing.assert_allclose(a, b, atol=1e-5 * scale, rtol=1e-4)


def test_what_a_mesh_does_not_divide_xla_does(key, interpreted):
    apply = make_apply(SMALL, programs=Programs("splash"), layout=layout(make_mesh(4, 1, 2)))
    params, x = noisy(SMALL, key), jax.random.normal(key, (3, 32, 32, 1))
    jax.eval_shape(lambda p: apply(p, x, jnp.full(3, 0.8), jnp.arange(3), 1), params)
    assert not interpreted


@pytest.mark.parametrize(
    "tokens, width, weighed, expected",
    [
        (64, 64, False, "cudnn"),
        (256, 72, False, "cudnn"),
        (65, 64, False, "xla"),  # no gradient
        (64, 36, False, "xla"),
        (64, 136, False, "xla"),
        (64, 64, True, "xla"),
    ],
)
def test_cudnn_is_xla_for_calls_that_it_does_not_take(
    tokens, width, weighed, expected, monkeypatch
):
    seen = []

    def program(q, k, v, bias=None, *, implementation):
        seen.append((implementation, bias is not None))
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", program)
    q = jnp.zeros((2, tokens, 2, width), jnp.bfloat16)
    weight = jnp.zeros((2, 1, 1, tokens)) if weighed else None
    attention.attend("cudnn", q, q, q, weight)
    assert seen == [(expected, weighed)]
