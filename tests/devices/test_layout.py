"""What the backward pass of a block keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from ppflow_jax.devices.sharding import layout, make_mesh
from ppflow_jax.models.stack import REMAT_POLICIES


@jax.custom_vjp
def straight_through(x):
    """Rounded forwards, the identity backwards: a custom derivative of one array."""
    return jnp.round(x)


straight_through.defvjp(lambda x: (straight_through(x), None), lambda _, g: (g,))


def gram(x):
    """A product whose derivative needs its argument."""
    return jax.lax.dot_general(x, x, (((1,), (1,)), ((), ())))


def residuals(function, x, capsys):
    policy = REMAT_POLICIES["none"]
    print_saved_residuals(jax.checkpoint(function, policy=policy), x)
    return [
        line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line
    ]


def test_the_result_of_a_foreign_custom_derivative_is_kept(capsys):
    x = jnp.ones((4, 4))
    kept = residuals(lambda x: gram(straight_through(x)), x, capsys)
    assert any("custom_vjp_call" in line for line in kept), kept


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_gathered_weights_are_not_kept(capsys):
    mesh = make_mesh(data=1, fsdp=8)
    weights = layout(mesh).weights

    def block(tree):
        return gram(weights(tree, "blocks/")["fc1"]["kernel"])

    tree = {"fc1": {"kernel": jnp.asarray(np.ones((8, 16), np.float32))}}
    with mesh:
        kept = residuals(block, tree, capsys)
    assert not kept
