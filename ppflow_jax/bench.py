"""Sampling speed of SiT and PPFlow with random weights: python -m ppflow_jax.bench --size=B"""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from ppflow_jax import cli
from ppflow_jax.flops import sampling_flops
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig, evaluations
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.ppflow import SIZES, ModelConfig, init_params, make_apply
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT

_SIZE = flags.DEFINE_enum("size", "B", list(SIZES), "Model size.")
_LATENT = flags.DEFINE_integer("latent_size", 32, "Side of the latent (4 channels).")
_BATCH = flags.DEFINE_integer("batch", 1, "Images sampled at once.")
_SOLVER = flags.DEFINE_enum("solver", "euler", ["euler", "heun"], "Solver.")
_STEPS = flags.DEFINE_integer("steps", 4, "Intervals of the aligned grid.")
_CFG = flags.DEFINE_float("cfg", 1.5, "Guidance scale of every guided stage.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds; every round times every row once.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of matrix products.")


def main() -> None:
    w, rows = _CFG.value, []
    for name, pyramid in {"SiT": SIT, "2 levels": PPFLOW2, "3 levels": PPFLOW3}.items():
        model = ModelConfig(
            pyramid, _LATENT.value, 4, **SIZES[_SIZE.value], num_classes=1000, learn_sigma=True
        )
        apply = make_apply(model, dtype=jnp.dtype(_DTYPE.value))
        params = init_params(model, jax.random.key(0))
        levels = len(pyramid)
        for cfg in [(w,) * levels] + [(1.0,) + (w,) * (levels - 1)] * (levels > 1):
            config = SamplerConfig(_SOLVER.value, _STEPS.value, cfg=cfg)
            rows.append(_Row(name, model, Sampler(apply, model, Flow(), config), params))
    noise = jax.random.normal(jax.random.key(1), (_BATCH.value, *rows[0].model.shape))
    labels = jnp.arange(_BATCH.value, dtype=jnp.int32)
    for row in rows:
        row.run(noise, labels)  # compile and warm up
    for _ in range(_ROUNDS.value):
        for row in rows:
            row.seconds.append(row.run(noise, labels))
    _report(rows)


class _Row:
    def __init__(self, name: str, model: ModelConfig, sampler: Sampler, params):
        self.name, self.model, self.sampler, self.params = name, model, sampler, params
        self.flops = sampling_flops(model, sampler.segments)
        self.seconds: list[float] = []

    def run(self, noise, labels) -> float:
        start = time.perf_counter()
        self.sampler(self.params, noise, labels).block_until_ready()
        return time.perf_counter() - start


def _report(rows: list[_Row]) -> None:
    base = rows[0]
    config = base.sampler.config
    device = jax.devices()[0].device_kind
    print(
        f"{_SIZE.value}, {_LATENT.value}x{_LATENT.value}x4 latents, batch {_BATCH.value}, "
        f"{config.solver} {config.steps} steps, {_DTYPE.value}, {device}, random weights; "
        f"median of {_ROUNDS.value} interleaved rounds (spread: quartiles)"
    )
    print(
        f"{'model':10}{'guidance':>14}{'NFE':>5}{'s/sample':>10}{'spread':>17}"
        f"{'GFLOPs':>9}{'of SiT':>8}{'implied':>9}{'measured':>10}{'reached':>9}"
    )
    for row in rows:
        cfg = row.sampler.config.scales(row.model.pyramid)
        per_image = np.array(row.seconds) / _BATCH.value
        low, _, high = statistics.quantiles(per_image, n=4) if len(per_image) > 1 else (0, 0, 0)
        # The ratio is taken within each round, so that a slow spell hits both sides.
        speedup = statistics.median(b / a for a, b in zip(row.seconds, base.seconds))
        implied = base.flops / row.flops
        print(
            f"{row.name:10}{','.join(f'{s:g}' for s in cfg):>14}"
            f"{evaluations(row.sampler.segments):5}{statistics.median(per_image):10.3f}"
            f"{f'{low:.3f}-{high:.3f}':>17}{row.flops / 1e9:9.1f}{1 / implied:8.1%}"
            f"{implied:8.2f}x{speedup:9.2f}x{speedup / implied:9.0%}"
        )


if __name__ == "__main__":
    cli.run(main)
