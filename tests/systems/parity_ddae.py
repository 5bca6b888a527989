"""DDAE against arrays of the authors' code (FutureXiang/ddae).

Their network is one of DDPM: it sees sqrt(abar) x + sqrt(1 - abar) noise and the number of the
step; both are given to ours as they are. Noise of a sample is fixed there as it is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.metrics.probe_heads import Head, epoch_rates, trained
from ppflow_jax.models.stack import Taps
from tests.acceptance.comparison import Row
from tests.systems.sit_reference import Sit, close, nchw, nhwc

if TYPE_CHECKING:
    from tests.systems_parity import Reference

NOISED, FEATURES, PROBE = 1e-6, 2e-5, 2e-5  # of the README, relative
STEPS = 1000
NULL = "model/y_embedder.embedding_table.weight[1000]"  # the row of the null class alone is stored


def rows(ref: Reference) -> Iterator[Row]:
    if "x_t" in ref:
        pairs = zip(ref["noise"], ref["timesteps"])
        ours = [noised(ref["latents"], noise, int(n)) for noise, n in pairs]
        yield from close(ref, "x_t", np.stack(ours), NOISED)
    if NULL in ref:
        yield from features(ref)
    if "probe/weight" in ref:
        yield from probe(ref)


def noised(latents: np.ndarray, noise: np.ndarray, n: int) -> np.ndarray:
    """x_n of linear betas from 1e-4 to 0.02."""
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, STEPS))[n]
    return np.float32(np.sqrt(kept)) * latents + np.float32(np.sqrt(1 - kept)) * noise


def model_of(ref: Reference) -> Sit:
    row = ref.arrays.pop(NULL)
    table = np.concatenate([np.zeros((STEPS, len(row)), np.float32), row[None]])
    ref.arrays["model/y_embedder.embedding_table.weight"] = table
    return Sit(ref, ref.config["num_heads"])


def features(ref: Reference) -> Iterator[Row]:
    sit = model_of(ref)
    depth, null = sit.config.depth, sit.config.null_label
    taps = Taps(h=tuple(range(1, depth + 1)))

    def tokens(x: np.ndarray, n: int) -> list[jax.Array]:
        t, y = jnp.full(len(x), float(n)), jnp.full(len(x), null)
        found = sit(sit.params, nhwc(x), t, y, taps).taps
        return [found[f"h/{i}"] for i in taps.h]

    pooled = []
    for i, n in enumerate(ref["timesteps"]):
        found = tokens(ref["x_t"][i], n)
        pooled.append([h.mean(axis=1) for h in found])
        if n == 121:
            yield from close(ref, "tokens_t121", jnp.stack(found), FEATURES)
    yield from close(ref, "features", jnp.array(pooled), FEATURES)
    outs = []
    for x, n in zip(ref["x_t"], ref["timesteps"]):
        t, y = jnp.full(len(x), float(n)), jnp.full(len(x), null)
        outs.append(nchw(sit.parts(nhwc(x), t, y, tokens(x, n)[-1])["out"]))
    yield from close(ref, "out", jnp.stack(outs), FEATURES)
    time, block = ref.config["probe_t"], int(ref.config["probe_block"].removeprefix("layer-"))
    x = noised(ref["probe/latents"], ref["probe/noise"], time)
    ours = tokens(x, time)[block].mean(axis=1)
    yield from close(ref, "probe/features", ours, FEATURES)


def probe(ref: Reference) -> Iterator[Row]:
    """The classifier on their features, in their order."""
    epochs, lr = ref.config["epochs"], ref.config["lr"]
    x, y = ref["probe/features"], ref["probe/labels"].astype(np.int32)
    steps = len(ref["probe/lr"]) // epochs
    size = int(ref["probe/batch_size"])
    order = np.tile(np.arange(steps * size).reshape(1, steps, size), (epochs, 1, 1))
    start = (jnp.asarray(ref["probe/init_weight"].T), jnp.asarray(ref["probe/init_bias"]))
    (weight, bias), _ = trained(start, x, y, order, lr)
    yield from close(ref, "probe/weight", jnp.swapaxes(weight, 1, 2), PROBE)
    yield from close(ref, "probe/bias", bias, PROBE)
    yield from close(ref, "probe/lr", np.repeat(epoch_rates(lr, epochs), steps), 1e-12)
    head = Head(np.asarray(weight[-1]), np.asarray(bias[-1]))
    yield from close(ref, "probe/logits", head.logits(x), PROBE)
    yield from close(ref, "probe/prediction", head.logits(x).argmax(-1), 0)
