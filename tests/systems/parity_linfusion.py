"""LinFusion against arrays of the authors' code (Huage001/LinFusion)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ppflow_jax.models.parts import Execution
from ppflow_jax.systems.linfusion import Phi, linear_attention
from tests.acceptance.comparison import Row

if TYPE_CHECKING:
    from tests.systems_parity import Reference


def rows(ref: Reference) -> Iterator[Row]:
    for name in ref.arrays:
        if name.endswith("/args"):
            yield from case(ref, name.removesuffix("/args"))


def case(ref: Reference, name: str) -> Iterator[Row]:
    settings = json.loads(str(ref[f"{name}/args"]))
    leaves = {k: jnp.asarray(w) for k, w in ref.below(f"{name}/model").items()}
    x = jnp.asarray(ref[f"{name}/x"])
    other = jnp.asarray(ref[f"{name}/encoder"]) if f"{name}/encoder" in ref else None

    def run(leaves, x, other):
        return outputs(settings, leaves, x, other)

    def total(leaves, x, other):
        return jnp.sum(run(leaves, x, other) * ref[f"{name}/cotangent"])

    bound = {k: max(1e-5, 10 * float(ref[f"deviation64/{name}/{k}"])) for k in ("out", "grad_x")}
    yield from _row(ref, f"{name}/out", jax.jit(run)(leaves, x, other), bound["out"])
    wanted = (0, 1) if other is None else (0, 1, 2)
    grads, *inputs = jax.jit(jax.grad(total, argnums=wanted))(leaves, x, other)
    for what, value in zip(("grad_x", "grad_encoder"), inputs):
        yield from _row(ref, f"{name}/{what}", value, bound["grad_x"])
    for leaf, value in grads.items():
        size = max(1.0, float(jnp.max(jnp.abs(value))))
        yield from _row(ref, f"{name}/grad/{leaf}", value, bound["grad_x"] * size)


def outputs(settings, w, x, other) -> jax.Array:
    """With `other` keys and values are of another sequence.

    Where the original has no phi it adds the input itself. It divides sums over keys by the number
    of queries, which ours does not: its result is M / N of ours.
    """
    heads, keys = settings["real_heads"], x if other is None else other

    def given(side: str, x: jax.Array) -> jax.Array:
        if f"to_{side}_.0.weight" not in w:
            return 2 * x
        return x + phi(w, f"to_{side}_", x)

    def projected(name: str, x: jax.Array) -> jax.Array:
        return (x @ w[f"{name}.weight"].T).reshape(*x.shape[:2], heads, -1)

    q, k = projected("to_q", given("q", x)), projected("to_k", given("k", keys))
    out = linear_attention(q, k, projected("to_v", keys)).reshape(*x.shape[:2], -1)
    out = out * (keys.shape[1] / x.shape[1])
    return out @ w["to_out.0.weight"].T + w["to_out.0.bias"][None, None]


def phi(w, name: str, x: jax.Array) -> jax.Array:
    hidden, width = w[f"{name}.0.weight"].shape
    graph, _ = nnx.split(nnx.eval_shape(lambda: Phi(width, hidden, Execution(), nnx.Rngs(0))))
    linear = lambda n: {"kernel": w[f"{name}.{n}.weight"].T, "bias": w[f"{name}.{n}.bias"]}
    norm = {"scale": w[f"{name}.1.weight"], "shift": w[f"{name}.1.bias"]}
    return nnx.merge(graph, norm | {"fc1": linear(0), "fc2": linear(3)})(x)


def _row(ref: Reference, name: str, ours: jax.Array, bound: float) -> Iterator[Row]:
    if name in ref:
        error = np.max(np.abs(np.float64(ours) - np.float64(ref[name])))
        yield Row(f"linfusion {name}", float(error), bound)
