"""What leaving out the null class of an unguided coarse stage saves, against what FLOPs promise.

    python -m benchmarks.guidance_skip --size=B --batch=2 --steps=8

Two plans for each pyramid, scales [1, w, ...]: one evaluates both halves in the coarse stage, as
the PyTorch code does, the other only the conditional one. Both are timed in every round, by
wall-clock and by processor time (all threads; on a CPU whose cores all compute it says the same,
and other work on the machine weighs less); the ratios are medians over rounds. Weights are random.
"""

from __future__ import annotations

import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ppflow_jax.flops import sampling_flops
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig, plan
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.host_memory import keep_scratch
from ppflow_jax.models.ppflow import SIZES, ModelConfig, abstract_params, make_apply
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT

_SIZE = flags.DEFINE_enum("size", "B", list(SIZES), "Model size.")
_BATCH = flags.DEFINE_integer("batch", 2, "Images.")
_STEPS = flags.DEFINE_integer("steps", 8, "Euler steps.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds.")
_SCALE = 1.5
# Guides in float64 and is 1 in float32: both halves are evaluated, the null class has weight 0.
_UNSKIPPED = 1 + 1e-12


def main(_) -> None:
    keep_scratch()
    rng = np.random.default_rng(0)
    for pyramid in (PPFLOW2, PPFLOW3):
        model = ModelConfig(pyramid, 32, 4, **SIZES[_SIZE.value], num_classes=1000)
        params = jax.tree.map(
            lambda s: jnp.float32(0.02 * rng.standard_normal(s.shape)), abstract_params(model)
        )
        noise = jax.random.normal(jax.random.key(1), (_BATCH.value, *model.shape))
        labels = jnp.arange(_BATCH.value, dtype=jnp.int32)
        apply, samplers = make_apply(model), []
        for first in (_UNSKIPPED, 1.0):
            cfg = (first, *(_SCALE,) * (len(pyramid) - 1))
            config = SamplerConfig("euler", _STEPS.value, cfg=cfg)
            samplers.append(Sampler(apply, model, Flow(), config))
        full, skipped = (s(params, noise, labels) for s in samplers)
        difference = float(jnp.abs(full - skipped).max() / jnp.abs(full).max())
        times = [[], []]
        for _ in range(_ROUNDS.value):
            for spent, sampler in zip(times, samplers):
                start = _clocks()
                sampler(params, noise, labels).block_until_ready()
                spent.append(_clocks() - start)
        flops = [sampling_flops(model, s.segments) for s in samplers]
        sit = SamplerConfig("euler", _STEPS.value, cfg=(_SCALE,))
        base = _sit_flops(model, sit)
        implied = flops[0] / flops[1]
        measured = np.median(np.divide(*map(np.array, times)), axis=0)
        shares = [f / base for f in flops]
        gained = (measured - 1) / (implied - 1)
        print(
            f"{len(pyramid)} levels: {shares[0]:.3f} -> {shares[1]:.3f} of SiT's FLOPs, "
            f"{implied:.3f}x implied, {measured[0]:.3f}x measured ({gained[0]:.0%} of the gain), "
            f"{measured[1]:.3f}x by processor time ({gained[1]:.0%}), "
            f"images differ by {difference:.1e} of their range",
            flush=True,
        )


def _clocks() -> np.ndarray:
    """Wall-clock and processor time."""
    return np.array([time.perf_counter(), time.process_time()])


def _sit_flops(model: ModelConfig, config: SamplerConfig) -> int:
    sit = replace(model, pyramid=SIT)
    return sampling_flops(sit, plan(config, SIT, Flow()))


if __name__ == "__main__":
    app.run(main)
