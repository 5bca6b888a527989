"""Compile time of accelerated plans against the plain 3-level sampler.

    python -m benchmarks.plan_compile

Counts processor time (all threads, so that other work on the machine weighs little) and
wall-clock time of tracing and compiling every program of a plan. The plans are compiled in turn,
the plain one before each of the others; times are medians over rounds, ratios those of a plan's
median and the median of the plain ones before it.
"""

from __future__ import annotations

import gc
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import abstract_params, make_apply
from ppflow_jax.pyramid import PPFLOW3
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated

_ROUNDS = flags.DEFINE_integer(
    "rounds", 3, "Every round compiles every plan once; one more comes first."
)
_WIDTH = flags.DEFINE_integer("width", 64, "Of the model; its depth hardly matters, see Trunk.")

_LATE = dict(
    cfg=(1.0, 1.5, 2.0, 2.5, 3.0, 2.5, 2.0),
    cfg_until=(0.25, 0.5, 0.625, 0.8125, 0.875, 0.9375, 1.0),
)
PLANS = {
    "plain, guided": (dict(cfg=(1.5,)), "exact"),
    "forecast": (dict(cfg=(1.5,)), "interval=3"),
    "scales by time": (_LATE, "exact"),
    "forecast, scales by time": (_LATE, "interval=3"),
    "forecast, unguided at both ends": (
        _LATE | dict(cfg=(1.0, 1.5, 2.0, 2.5, 3.0, 2.0, 1.0)),
        "interval=3",
    ),
    "merged": (dict(cfg=(1.5,)), "merge=sdtm"),
    "merged, unguided at first": (
        dict(cfg=(1.0, 1.25, 1.5, 2.0, 2.5), cfg_until=(0.25, 0.375, 0.625, 0.9375, 1.0)),
        "merge=sdtm",
    ),
}


def main(_) -> None:
    model = ModelConfig(PPFLOW3, 32, 4, _WIDTH.value, 4, 4, num_classes=10)
    params = abstract_params(model)
    noise = jax.ShapeDtypeStruct((2, *model.shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((2,), jnp.int32)

    def compiled(name: str) -> tuple[np.ndarray, str]:
        """Processor and wall-clock seconds, and the plan's size."""
        guidance, text = PLANS[name]
        config = SamplerConfig("euler", 64, **guidance)
        segments = accelerated(config, model, Flow(), AccelerateConfig.parse(text))
        sampler = Sampler(make_apply(model), model, Flow(), config, segments=segments)
        jax.clear_caches()
        gc.collect()  # what plans before have left is not this one's time
        start = _clocks()
        programs = [p.compile() for p in sampler.lower(params, noise, labels, None)]
        return _clocks() - start, f"{len(segments):9}{len(programs):9}"

    plain, *others = PLANS
    seconds = {name: [] for name in others}
    for round_number in range(_ROUNDS.value + 1):
        for name in others:
            (base, _), (spent, size) = compiled(plain), compiled(name)
            if round_number:
                seconds[name].append((base, spent, size))
    times = f"{'cpu s':>8}{'ratio':>7}{'wall s':>8}{'ratio':>7}"
    print(f"{'plan':34}{'segments':>9}{'programs':>9}{times}")
    for name, rows in seconds.items():
        base, spent = (np.median([row[i] for row in rows], axis=0) for i in range(2))
        (cpu, wall), (cpu_ratio, wall_ratio) = spent, spent / base
        print(f"{name:34}{rows[0][2]}{cpu:8.2f}{cpu_ratio:7.2f}{wall:8.2f}{wall_ratio:7.2f}")


def _clocks() -> np.ndarray:
    """Processor and wall-clock time."""
    return np.array([time.process_time(), time.perf_counter()])


if __name__ == "__main__":
    app.run(main)
