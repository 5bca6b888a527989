"""Compile time of accelerated plans against the plain 3-level sampler.

    python -m benchmarks.plan_compile

Counts processor time of tracing and compiling, all threads (of a first batch less that of a
second one), so that other work on the machine weighs little; the plans are compiled in turn, and
the ratio is the median over rounds.
"""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
from absl import app, flags

from ppflow_jax.accelerate.config import AccelerateConfig, accelerated
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.ppflow import ModelConfig, abstract_params, make_apply
from ppflow_jax.pyramid import PPFLOW3

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
    "merged, scales by time": (_LATE, "merge=sdtm"),
}


def main(_) -> None:
    model = ModelConfig(PPFLOW3, 32, 4, _WIDTH.value, 4, 4, num_classes=10)
    params = jax.tree.map(lambda s: jnp.zeros(s.shape), abstract_params(model))
    noise, labels = jnp.zeros((2, *model.shape)), jnp.zeros(2, jnp.int32)
    seconds = {name: [] for name in PLANS}
    counts = {}
    for round_number in range(_ROUNDS.value + 1):
        for name, (guidance, text) in PLANS.items():
            config = SamplerConfig("euler", 64, **guidance)
            segments = accelerated(config, model, Flow(), AccelerateConfig.parse(text))
            sampler = Sampler(make_apply(model), model, Flow(), config, segments=segments)
            jax.clear_caches()
            first, again = (_processor_time(sampler, params, noise, labels) for _ in range(2))
            if round_number:
                seconds[name].append(first - again)
            programs = sampler.compiled._cache_size() + sampler.accelerated._cache_size()
            counts[name] = len(segments), programs
    base = seconds["plain, guided"]
    print(f"{'plan':34}{'segments':>9}{'programs':>9}{'cpu s':>8}{'ratio':>8}")
    for name, spent in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(spent, base))
        print(
            f"{name:34}{counts[name][0]:9}{counts[name][1]:9}"
            f"{statistics.median(spent):8.2f}{ratio:8.2f}"
        )


def _processor_time(sampler, params, noise, labels) -> float:
    start = time.process_time()
    sampler(params, noise, labels).block_until_ready()
    return time.process_time() - start


if __name__ == "__main__":
    app.run(main)
