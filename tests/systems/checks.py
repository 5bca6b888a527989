"""What the tests of accelerators share."""

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.flow.method import Evaluation
from ppflow_jax.models.network import abstract_params


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
    return jax.tree.map(
        lambda s: jnp.float32(0.3 * rng.normal(size=s.shape)), abstract_params(model)
    )
