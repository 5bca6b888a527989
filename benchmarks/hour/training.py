"""Minutes of training, then a grid of samples: latents of a folder, or digits."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import ppflow_jax as pf
from benchmarks.hour.record import bad
from benchmarks.hour.work import Work, same_device
from configs import digits, imagenet256
from ppflow_jax.data.save import save_grid
from ppflow_jax.errors import Stopped
from ppflow_jax.train.loop import train
from ppflow_jax.train.metrics_log import read_metrics

SIZE, SIZE_TINY = "ppflow_b2", dict(width=32, depth=2, heads=2)
SAMPLES, COLUMNS, STEPS, CFG = 64, 16, 20, 2.0
FOR_SAMPLES = 0.35  # of the time, at most 60 s: compiling and sampling after training
POINTS = 200  # of the loss in the record


def run(work: Work) -> None:
    same_device(work.settings)
    work.each([("train", lambda: _trained(work)), ("samples", lambda: _sampled(work))])


def config_of(latents: str, tiny: bool) -> ConfigDict:
    """Two levels: B on latents, the demo's model on digits. It trains until it is stopped."""
    if latents:
        c = imagenet256.get_config(SIZE)
        c.data.source, c.data.path = "arrays", str(Path(latents).absolute())
        c.optim.warmup_steps = 500
        size, channels, classes = shape_of(latents)
        c.model.update(dict(latent_size=size, channels=channels, num_classes=classes))
    else:
        c = digits.get_config()
        c.optim.schedule = "constant"  # a decay needs an end
        c.data.batch_size = 256
    if tiny:
        c.model.update(SIZE_TINY)
        c.data.batch_size = 16
    c.train.steps, c.train.log_every, c.train.save_every = 10**7, 20, 1000
    c.train.keep, c.sample.every = 1, 0
    return c


def shape_of(latents: str) -> tuple[int, int, int]:
    """Side, channels and classes of `latents.npy` and `labels.npy`."""
    x = np.load(Path(latents) / "latents.npy", mmap_mode="r")
    labels = np.load(Path(latents) / "labels.npy", mmap_mode="r")
    return x.shape[1], x.shape[-1], int(labels.max()) + 1


def _trained(work: Work) -> dict[str, Any]:
    """Until the time for samples; a run that is there continues."""
    folder = work.settings.out / "run"
    seconds = 6.0 if work.tiny else work.left - min(60.0, FOR_SAMPLES * work.left)
    try:
        with _stopped_after(seconds, folder / "metrics.jsonl"):
            train(config_of(work.settings.latents, work.tiny), str(folder))
    except Stopped as e:
        print(f"  {e}", flush=True)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    every = max(1, len(rows) // POINTS)
    rate = float(np.median([row["images_per_s"] for row in rows[1:] or rows]))
    found: dict[str, Any] = {"data": work.settings.latents or "digits", "seconds": seconds}
    found["loss"] = [[row["step"], row["loss"]] for row in rows[::every]]
    found |= {"steps": rows[-1]["step"], "images_per_second": rate, "last": rows[-1]["loss"]}
    found["good"] = bool(np.isfinite(found["last"]))
    said = f"{found['steps']} steps of {found['data']}, loss {found['loss'][0][1]:.3f} to"
    return found | {"said": f"{said} {found['last']:.3f}, {rate:.0f} images/s"}


@contextmanager
def _stopped_after(seconds: float, metrics: Path) -> Iterator[None]:
    """Asks this process to stop as a scheduler would, until the block has ended.

    Not before a line of metrics is there: compiling is no training.
    """
    ended, before = threading.Event(), read_metrics(metrics)[-1:]

    def ask() -> None:
        ended.wait(seconds)
        while not ended.is_set() and read_metrics(metrics)[-1:] == before:
            ended.wait(0.5)
        while not ended.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
            ended.wait(1.0)

    # While the training loop does not listen yet, or no more, the signal ends nothing.
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGTERM, handler)


def _sampled(work: Work) -> dict[str, Any]:
    """A grid of EMA samples, in columns of a class."""
    if any(row["key"] == "train" and bad(row) for row in work.record.rows):
        raise RuntimeError("there is nothing to sample: training failed, see its row")
    model = pf.load(work.settings.out / "run")
    count = 16 if work.tiny else SAMPLES
    plan = model.plan(steps=4 if work.tiny else STEPS, cfg=CFG)
    classes = np.arange(count) % COLUMNS % model.config.num_classes
    samples = model.sample(count, plan=plan, labels=classes, seed=0, microbatch=count)
    save_grid(work.settings.out / "grid.png", samples.pictures, columns=COLUMNS)
    spread = float(np.std(samples.latents))
    kind = "false colours of latents" if work.settings.latents else "pictures"
    return {
        "samples": count,
        "spread": spread,
        "good": bool(np.isfinite(spread)),
        "said": f"{count} {kind} in grid.png, guidance {CFG:g}, {plan.nfe} evaluations",
    }
