import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.devices.sharding import layout, make_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.models import attention
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import abstract_params, make_apply
from ppflow_jax.pyramid import PPFLOW2

TINY = ModelConfig(PPFLOW2, latent_size=8, channels=3, width=16, depth=2, heads=2, num_classes=5)


def arrays(key, count, shape, dtype=jnp.float32):
    return [jax.random.normal(k, shape).astype(dtype) for k in jax.random.split(key, count)]


def by_definition(q, k, v):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(q.shape[-1])
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhe->bqhe", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize(("tokens", "head"), [(16, 64), (24, 72)])
def test_the_kernel_is_attention_and_its_gradient(tokens, head, key):
    q, k, v, g = arrays(key, 4, (2, tokens, 3, head))
    out = attention.forward(q, k, v, interpret=True)
    np.testing.assert_allclose(out, by_definition(q, k, v), atol=2e-6)
    ours = attention.backward(q, k, v, g, interpret=True)
    _, backward = jax.vjp(attention.pallas_attention, q, k, v)  # XLA's, on a CPU
    for a, b in zip(ours, backward(g)):
        np.testing.assert_allclose(a, b, atol=5e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_deferred_division_changes_nothing(weighted, key):
    q, k, v, g = arrays(key, 4, (2, 12, 3, 8))
    weight = jnp.log(jnp.arange(1.0, 25)).reshape(2, 1, 1, 12) if weighted else None

    def run(name):
        out, backward = jax.vjp(lambda *qkv: attention.attend(name, *qkv, weight), q, k, v)
        return out, *backward(g)

    for a, b in zip(run("deferred"), run("xla")):
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_the_kernel_keeps_the_dtype(key):
    q, k, v = arrays(key, 3, (1, 16, 2, 8), jnp.bfloat16)
    out = attention.forward(q, k, v, interpret=True)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), by_definition(q, k, v), atol=2e-2)


def noisy(config, key):
    leaves, tree = jax.tree.flatten(abstract_params(config))
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([0.2 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves)])


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_a_network_with_the_kernel_on_a_mesh(remat, key):
    """Batch and heads are split, and gradients are those of the plain network."""
    params = noisy(TINY, key)
    x, t, y = jax.random.normal(key, (4, 8, 8, 3)), jnp.full(4, 0.3), jnp.arange(4)
    mesh = make_mesh(2, 2, 2)

    def gradient(apply):
        return jax.jit(jax.grad(lambda p: jnp.sum(apply(p, x, t, y, 0) ** 2)))(params)

    plain = gradient(make_apply(TINY))
    options = dict(attention="pallas", remat=remat, layout=layout(mesh))
    kernel = gradient(make_apply(TINY, **options))
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(kernel)):
        np.testing.assert_allclose(a, b, atol=1e-5 * scale, rtol=1e-4)
    apply = make_apply(TINY, **options)
    assert "shard_map" in str(jax.make_jaxpr(lambda p: apply(p, x, t, y, 0))(params))


def test_programs_that_do_not_go_together_are_refused():
    with pytest.raises(InputError, match="auto, xla, deferred"):
        make_apply(TINY, attention="flash")
    with pytest.raises(InputError, match="needs dtype bfloat16"):
        make_apply(TINY, attention="cudnn")
    make_apply(TINY, attention="cudnn", dtype=jnp.bfloat16)
