"""What the tests of accelerators share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.flow.method import Evaluation
from ppflow_jax.models.network import abstract_params, make_apply


def within(rows):
    """All comparisons with the reference are inside their bounds."""
    rows = list(rows)
    over = [f"{r.name}: {r.error:.2e} > {r.bound:.1e}" for r in rows if not r.ok]
    assert rows and not over, over


def first_full(method, call, inputs):
    """A full evaluation with a new memory: (result, memory)."""
    now = Evaluation(call, inputs, True)
    return method.evaluate(now, method.memory(now))


def random_params(model):
    """Parameters under which every part of the network shows in the output."""
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(np.float32(0.3 * rng.normal(size=s.shape)))
    return jax.tree.map(draw, abstract_params(model))


@functools.cache
def compiled(model, **options):
    """The network as one program: otherwise every operation of every shape is one."""
    apply = make_apply(model, **options)

    def run(params, x, t, y, stage, trunk=None, **named):
        return apply(params, x, t, y, stage, trunk, **named)

    static = ("trunk", "taps", "parts", "on")
    return jax.jit(run, static_argnums=(4, 5), static_argnames=static)
