"""Scalar conditions against the guidance-scale embedding of the diffusers library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ppflow_jax.models.conditions import Scalar, sinusoid
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.parts import Execution
from ppflow_jax.pyramid import SIT
from tests.acceptance.comparison import Row

if TYPE_CHECKING:
    from tests.systems_parity import Reference

SCALE = 1000.0


def rows(ref: Reference) -> Iterator[Row]:
    w = jnp.asarray(ref["w"])
    for name in ref.arrays:
        if found := re.fullmatch(r"embedding_(\d+)", name):
            yield from embedding(ref, name, w, int(found[1]))
    if "time_embedding_out" in ref:
        yield from time_embedding(ref, w)


def embedding(ref: Reference, name: str, w: jax.Array, features: int) -> Iterator[Row]:
    """Theirs multiplies in float32: its angles are off by half a unit of the largest."""
    ours = np.asarray(sinusoid(w, features, SCALE))
    assert ours.shape == ref[name].shape, name
    error = np.abs(ours - ref[name]).max()
    yield Row(f"w_embedding {name}", float(error), 2e-3)
    half = features // 2
    angles = SCALE * np.float64(ref["w"])[:, None] * 10000.0 ** (-np.arange(half) / (half - 1))
    exact = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    error = np.abs(ours[:, : 2 * half] - exact).max()
    yield Row(f"w_embedding {name} (its formula in float64)", float(error), 3e-6)


def time_embedding(ref: Reference, w: jax.Array) -> Iterator[Row]:
    """Its projection is added to what enters the MLP of time, which is the same otherwise.

    With their sinusoid, which has angles of float32, and with ours.
    """
    weights = {k: jnp.asarray(v) for k, v in ref.below("time_embedding").items()}
    projection = weights["cond_proj.weight"]
    model = ModelConfig(SIT, 8, 4, 16, 1, 1, 1, conditions=(Scalar("w", projection.shape[1]),))
    (scalar,) = model.conditions

    def out(weights, theirs):
        linear = nnx.eval_shape(lambda: scalar.module(model, Execution(), nnx.Rngs(0)))
        module = nnx.merge(nnx.split(linear)[0], {"kernel": weights["cond_proj.weight"].T})
        features = ref[f"embedding_{scalar.features}"] if theirs else None
        more = scalar.vector(module, w) if features is None else module(jnp.asarray(features))
        h = jnp.asarray(ref["time_embedding_in"]) + more
        h = h @ weights["linear_1.weight"].T + weights["linear_1.bias"][None]
        return jax.nn.silu(h) @ weights["linear_2.weight"].T + weights["linear_2.bias"][None]

    def cotangent(weights, theirs):
        return jnp.sum(out(weights, theirs) * ref["time_embedding_cotangent"])

    for theirs, bound in ((True, 1e-5), (False, 2e-3)):
        yield from row(ref, "time_embedding_out", out(weights, theirs), bound)
        for name, gradient in jax.grad(cotangent)(weights, theirs).items():
            yield from row(ref, f"time_embedding_grad/{name}", gradient, bound)


def row(ref: Reference, name: str, ours: jax.Array, bound: float) -> Iterator[Row]:
    theirs = ref[name]
    assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
    error = np.abs(np.asarray(ours) - theirs).max()
    largest = max(1.0, float(np.abs(theirs).max()))
    yield Row(f"w_embedding {name} (to {bound:g})", float(error), bound * largest)
