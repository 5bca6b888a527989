"""What a pass gives of its inside."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppflow_jax.devices.programs import Programs
from ppflow_jax.errors import InputError
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import layer_norm
from ppflow_jax.models.stack import Taps, cuts
from ppflow_jax.pyramid import PPFLOW2
from tests.systems.checks import compiled, random_params

MODEL = ModelConfig(PPFLOW2, latent_size=8, channels=2, width=16, depth=4, heads=2, num_classes=3)
ALL = Taps(h=(1, 3, 4), logits=(1, 2))


@pytest.fixture(scope="module")
def params():
    return random_params(MODEL)


@pytest.fixture(scope="module")
def inputs():
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, 2))
    return x, jnp.array([0.1, 0.2, 0.3]), jnp.array([0, 1, 3])


def programs(unrolled):
    return compiled(MODEL, programs=Programs(unrolled=unrolled))


@pytest.mark.parametrize("unrolled", [False, True])
def test_tokens_after_so_many_blocks(params, inputs, unrolled):
    found = programs(unrolled)(params, *inputs, 0, taps=ALL).taps
    assert set(found) == {"h/1", "h/3", "h/4", "logits/1", "logits/2"}

    def trunk(blocks, h, c):
        return jax.lax.scan(lambda h, block: (block(h, c),) * 2, h, blocks)

    _, states = programs(unrolled)(params, *inputs, 0, trunk)
    for n in ALL.h:
        np.testing.assert_allclose(found[f"h/{n}"], states[n - 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("layer", [1, 2])  # both of one run of blocks
def test_logits_are_scaled_products_of_queries_and_keys(params, inputs, layer, unrolled):
    found = programs(unrolled)(params, *inputs, 1, taps=Taps(logits=(1, 2))).taps
    tokens = programs(unrolled)(params, *inputs, 1, taps=Taps(h=(layer,))).taps[f"h/{layer}"]
    block = {k: v for k, v in params["blocks"].items() if k in ("attention", "adaln")}
    block = jax.tree.map(lambda leaf: np.asarray(leaf[layer], np.float64), block)
    c = []

    def trunk(blocks, h, condition):
        c.append(np.asarray(condition, np.float64))
        return h, None

    with jax.disable_jit():
        programs(False)(params, *inputs, 1, trunk)
    shift, scale = np.split(c[0] @ block["adaln"]["kernel"] + block["adaln"]["bias"], 6, -1)[:2]
    x = np.asarray(layer_norm(tokens)) * (1 + scale[:, None]) + shift[:, None]
    qkv = np.einsum("bnd,dche->bnche", x, block["attention"]["qkv_kernel"])
    q, k = (qkv + block["attention"]["qkv_bias"])[:, :, :2].transpose(2, 0, 3, 1, 4)
    expected = np.einsum("bhqe,bhke->bhqk", q, k) / np.sqrt(MODEL.head_width)
    logits = found[f"logits/{layer}"]
    assert logits.shape == (3, 2, 16, 16)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("taps", [Taps(h=(2,)), ALL, Taps(h=(4,), logits=(0, 3))])
def test_taps_leave_prediction_and_gradient(params, inputs, taps, unrolled):
    def loss(params, taps):
        output = programs(unrolled)(params, *inputs, 1, taps=taps)
        return jnp.sum(jnp.square(output.prediction if taps else output))

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, tapped = (both(params, t) for t in (Taps(), taps))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), plain, tapped)


def test_without_taps_the_program_has_none(params, inputs):
    def text(**given):
        made = jax.make_jaxpr(lambda p, *x: programs(False)(p, *x, 1, **given))(params, *inputs)
        return re.sub(r"0x[0-9a-f]+", "", str(made))

    assert text() == text(taps=Taps())
    assert text().count("scan[") == text(taps=Taps(h=(4,))).count("scan[") == 1
    assert text(taps=Taps(h=(2,))).count("scan[") == 2


def test_where_a_stack_is_cut():
    assert list(cuts(6, Taps())) == [(0, 6)]
    assert list(cuts(6, Taps(h=(6,)))) == [(0, 6)]
    assert list(cuts(6, Taps(h=(2,), logits=(3, 4)))) == [(0, 2), (2, 3), (3, 5), (5, 6)]
    assert list(cuts(3, Taps(logits=(0, 1, 2)))) == [(0, 3)]


def test_joined():
    assert Taps(h=(3,), logits=(1,)) | Taps(h=(1, 3)) == Taps((1, 3), (1,))


@pytest.mark.parametrize("taps", [Taps(h=(0,)), Taps(h=(5,)), Taps(logits=(4,))])
def test_blocks_that_there_are_not(params, inputs, taps):
    with pytest.raises(InputError, match="the model has"):
        programs(False)(params, *inputs, 0, taps=taps)
