"""The work of the command `bench`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from ppflow_jax.cost.calibrate import calibrate, text
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
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT

PYRAMIDS = {"SiT": SIT, "2 levels": PPFLOW2, "3 levels": PPFLOW3}

FLAGS = flags.FLAGS


def compare() -> None:
    """What the flags of the command say."""
    if unknown := [s for s in FLAGS.size if s not in SIZES]:
        raise InputError(f"--size has {unknown[0]!r}: give some of {','.join(SIZES)}")
    if unknown := [w for w in FLAGS.work if w not in ("train", "sample")]:
        raise InputError(f"--work has {unknown[0]!r}: give train, sample or both")
    for name in ("latent_size", "batch", "train_batch", "steps", "rounds"):
        if FLAGS[name].value < 1:
            raise InputError(f"--{name} must be at least 1, got {FLAGS[name].value}")
    keep_scratch()
    if FLAGS.calibrate:
        measured = calibrate(FLAGS.dtype, FLAGS.rounds)
        print(f"{text(measured)}\nkept in {measured.write()}; next: ppflow train --dry_run=here")
        return
    device = jax.devices()[0]
    print(
        f"{device.device_kind}, {FLAGS.dtype}, {FLAGS.latent_size}x{FLAGS.latent_size}x4 latents, "
        f"random weights, median of {FLAGS.rounds} interleaved rounds; one device"
    )
    with tempfile.TemporaryDirectory() as cache:  # an empty one: the first compilation is cold
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        results = _measure()
    if FLAGS.json:
        with atomic(Path(FLAGS.json)) as path:
            path.write_text(json.dumps(results, indent=1) + "\n")


def _measure() -> list[dict[str, Any]]:
    ceiling, results = Ceiling(jnp.dtype(FLAGS.dtype)), []
    for size in FLAGS.size:
        for work in FLAGS.work:
            rows = _rows(size, work)
            for row in rows:
                row.call()  # warm up
            for _ in range(FLAGS.rounds):
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
        return f"{size}, training step, batch {FLAGS.train_batch}"
    return f"{size}, {FLAGS.solver} {FLAGS.steps} steps, batch {FLAGS.batch}"


def _rows(size: str, work: str) -> list[Row]:
    rows, w = [], FLAGS.cfg
    settings = Settings(jnp.dtype(FLAGS.dtype), FLAGS.attention, FLAGS.remat)
    for name, pyramid in PYRAMIDS.items():
        model = ModelConfig(pyramid, FLAGS.latent_size, 4, **SIZES[size], num_classes=1000)
        if work == "train":
            rows.append(training_row(name, size, model, FLAGS.train_batch, settings))
            continue
        levels = len(pyramid)
        for cfg in [(w,) * levels] + [(1.0,) + (w,) * (levels - 1)] * (levels > 1):
            config = SamplerConfig(FLAGS.solver, FLAGS.steps, cfg=cfg)
            rows.append(sampling_row(name, size, model, config, FLAGS.batch, settings))
    return rows
