"""Speed with random weights: python -m ppflow_jax.bench --size=B --work=train,sample

Measures SiT and PPFlow of 2 and 3 levels side by side: a training step, and sampling. Prints a
table and, with --json, writes all figures. Nothing else should run on the machine; the rows are
timed in turn, and ratios are taken within a round, so that a slow spell hits both sides.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from ppflow_jax import cli
from ppflow_jax.cost.measure import (
    Ceiling,
    Row,
    Settings,
    row_figures,
    sampling_row,
    table,
    training_row,
)
from ppflow_jax.devices.host_memory import keep_scratch
from ppflow_jax.devices.programs import ATTENTIONS
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.network import REMAT_POLICIES
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT

_SIZE = flags.DEFINE_list("size", ["B"], f"Model sizes of {','.join(SIZES)}.")
_WORK = flags.DEFINE_list("work", ["sample"], "train, sample or both.")
_LATENT = flags.DEFINE_integer("latent_size", 32, "Side of the latent (4 channels).")
_BATCH = flags.DEFINE_integer("batch", 1, "Images sampled at once.")
_TRAIN_BATCH = flags.DEFINE_integer("train_batch", 8, "Images of a training step.")
_SOLVER = flags.DEFINE_enum("solver", "euler", ["euler", "heun"], "Solver.")
_STEPS = flags.DEFINE_integer("steps", 4, "Intervals of the aligned grid.")
_CFG = flags.DEFINE_float("cfg", 1.5, "Guidance scale of every guided stage.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds; every round times every row once.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of matrix products.")
_ATTENTION = flags.DEFINE_enum("attention", "auto", ATTENTIONS, "As config.model.attention.")
_REMAT = flags.DEFINE_enum("remat", "none", list(REMAT_POLICIES), "As config.model.remat.")
_JSON = flags.DEFINE_string("json", None, "File for all figures.")

PYRAMIDS = {"SiT": SIT, "2 levels": PPFLOW2, "3 levels": PPFLOW3}


def main() -> None:
    if unknown := [s for s in _SIZE.value if s not in SIZES]:
        raise InputError(f"--size has {unknown[0]!r}: give some of {','.join(SIZES)}")
    if unknown := [w for w in _WORK.value if w not in ("train", "sample")]:
        raise InputError(f"--work has {unknown[0]!r}: give train, sample or both")
    for name in ("latent_size", "batch", "train_batch", "steps", "rounds"):
        if flags.FLAGS[name].value < 1:
            raise InputError(f"--{name} must be at least 1, got {flags.FLAGS[name].value}")
    keep_scratch()
    device = jax.devices()[0]
    print(
        f"{device.device_kind}, {_DTYPE.value}, {_LATENT.value}x{_LATENT.value}x4 latents, random "
        f"weights, median of {_ROUNDS.value} interleaved rounds; one device"
    )
    with tempfile.TemporaryDirectory() as cache:  # an empty one: the first compilation is cold
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        results = _measure()
    if _JSON.value:
        with atomic(Path(_JSON.value)) as path:
            path.write_text(json.dumps(results, indent=1) + "\n")


def _measure() -> list[dict[str, Any]]:
    ceiling, results = Ceiling(jnp.dtype(_DTYPE.value)), []
    for size in _SIZE.value:
        for work in _WORK.value:
            rows = _rows(size, work)
            for row in rows:
                row.call()  # warm up
            for _ in range(_ROUNDS.value):
                ceiling.time()
                for row in rows:
                    row.time()
            figures = [row_figures(row, rows[0], ceiling.rate) for row in rows]
            results += figures
            print(f"\n{_title(size, work)}; matmul ceiling {ceiling.rate / 1e9:,.0f} GFLOP/s")
            print(table(figures), flush=True)
    return results


def _title(size: str, work: str) -> str:
    if work == "train":
        return f"{size}, training step, batch {_TRAIN_BATCH.value}"
    return f"{size}, {_SOLVER.value} {_STEPS.value} steps, batch {_BATCH.value}"


def _rows(size: str, work: str) -> list[Row]:
    rows, w = [], _CFG.value
    settings = Settings(jnp.dtype(_DTYPE.value), _ATTENTION.value, _REMAT.value)
    for name, pyramid in PYRAMIDS.items():
        model = ModelConfig(pyramid, _LATENT.value, 4, **SIZES[size], num_classes=1000)
        if work == "train":
            rows.append(training_row(name, size, model, _TRAIN_BATCH.value, settings))
            continue
        levels = len(pyramid)
        for cfg in [(w,) * levels] + [(1.0,) + (w,) * (levels - 1)] * (levels > 1):
            config = SamplerConfig(_SOLVER.value, _STEPS.value, cfg=cfg)
            rows.append(sampling_row(name, size, model, config, _BATCH.value, settings))
    return rows


if __name__ == "__main__":
    cli.run(main)
