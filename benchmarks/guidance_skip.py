"""What leaving out the null class of an unguided coarse stage saves, against what FLOPs promise.

    python -m benchmarks.guidance_skip --size=B --batch=8 --steps=4

Two plans for each pyramid, scales [1, w, ...]: one evaluates both halves in the coarse stage, as
the PyTorch code does, the other only the conditional one. They share the later stages, which are
timed once a round: the difference is then that of the two coarse stages, not of two long runs. The
coarse stages are timed beside each other, several times in turn a round, by wall-clock and by
processor time (all threads; on a CPU whose cores all compute it says the same, and other work on
the machine weighs less). Times are medians over rounds. Weights are random.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ppflow_jax.devices.host_memory import keep_scratch
from ppflow_jax.flow.cost import sampling_flops
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig, plan
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.network import abstract_params, make_apply
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT

_SIZE = flags.DEFINE_enum("size", "B", list(SIZES), "Model size.")
_BATCH = flags.DEFINE_integer("batch", 8, "Images.")
_STEPS = flags.DEFINE_integer("steps", 4, "Euler steps.")
_ROUNDS = flags.DEFINE_integer("rounds", 11, "Timed rounds.")
_SCALE = 1.5
_TURNS = 3
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
        flops, coarse = [], []
        for first in (_UNSKIPPED, 1.0):
            cfg = (first, *(_SCALE,) * (len(pyramid) - 1))
            config = SamplerConfig("euler", _STEPS.value, cfg=cfg)
            segments = plan(config, pyramid, Flow())
            flops.append(sampling_flops(model, segments))
            sampler = partial(Sampler, make_apply(model), model, Flow(), config)
            coarse.append(sampler(segments=segments[:1]))
            later = sampler(segments=segments[1:])  # the same of either plan
        images = [later(params, s(params, noise, labels), labels) for s in coarse]
        difference = float(jnp.abs(images[0] - images[1]).max() / jnp.abs(images[0]).max())
        times = {sampler: [] for sampler in (*coarse, later)}
        for _ in range(_ROUNDS.value):
            for sampler in (*coarse * _TURNS, later):
                start = _clocks()
                sampler(params, noise, labels).block_until_ready()
                times[sampler].append(_clocks() - start)
        base = _sit_flops(model, SamplerConfig("euler", _STEPS.value, cfg=(_SCALE,)))
        implied = flops[0] / flops[1]
        full, skipped, rest = (np.median(spent, axis=0) for spent in times.values())
        measured = (full + rest) / (skipped + rest)
        shares = [f / base for f in flops]
        gained = (measured - 1) / (implied - 1)
        print(
            f"{len(pyramid)} levels: coarse stage in {skipped[0] / full[0]:.2f} of the time, "
            f"{shares[0]:.3f} -> {shares[1]:.3f} of SiT's FLOPs, "
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
