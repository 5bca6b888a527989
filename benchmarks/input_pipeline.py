"""Throughput of reading alone, beside what a training step consumes.

    python -m benchmarks.input_pipeline --out=DIR [--folder=IMAGES] [--records=N] [--step]

Writes a cache of N random latents 32x32x4 with standard deviation (32 kB each) below DIR, and
reads batches of 256 from it as training does; then the pictures of a folder at 256 pixels (JPEGs of
500x375, made below DIR if no folder is given). Prints images/s, the median of `--rounds` timings,
for 0 (threads), 1 and 2 worker processes, and images per second of processor time for threads,
which says what a core does when others use the machine too. With `--step`, also the images/s of a
training step of PPFlow-S/2 in float32 here.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from configs import ppflow_s2
from ppflow_jax.console import table
from ppflow_jax.data.cache import Manifest, encode_record
from ppflow_jax.data.pipeline import Source, Stream
from ppflow_jax.data.records import WRITER_OPTIONS, Shard, sha256
from ppflow_jax.data.sources import open_source
from ppflow_jax.models.network import make_apply
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.optimizer import make_optimizer
from ppflow_jax.train.state import init_state
from ppflow_jax.train.step import make_train_step

BATCH = 256
SHAPE = (32, 32, 4)


def make_cache(folder: Path, records: int, shards: int = 4) -> None:
    """Random latents in the format of `ppflow_jax.prepare`."""
    rng, facts = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for s in range(shards):
        path, count = folder / f"shard-{s:05d}-of-{shards:05d}.array_record", records // shards
        writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
        for _ in range(count):
            mean, std = rng.standard_normal((2, *SHAPE), np.float32)
            writer.write(encode_record(mean, np.abs(std), int(rng.integers(1000))))
        writer.close()
        facts.append(Shard(path.name, path.stat().st_size, sha256(path), count, (0, 999), ()))
    Manifest(
        dataset={"source": "random"},
        autoencoder={"kind": "none", "sha256": ""},
        size=256,
        flips="one",
        shape=SHAPE,
        std=True,
        latent_scale=1.0,
        batch=1,
        shard_pictures=records // shards,
        shards=tuple(facts),
    ).write(folder)


def make_folder(folder: Path, count: int) -> None:
    """Smooth random JPEGs of 500x375 pixels in one class."""
    rng = np.random.default_rng(0)
    (folder / "class").mkdir(parents=True, exist_ok=True)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8))
        fine = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        fine += rng.integers(-12, 13, fine.shape, np.int16)
        picture = Image.fromarray(np.clip(fine, 0, 255).astype(np.uint8))
        picture.save(folder / "class" / f"{i:05d}.jpg", quality=90)


def images_per_s(source: Source, workers: int, count: int, rounds: int) -> tuple[float, float]:
    """Per second and per second of this process's processor time: medians of `count` batches."""
    options = dict(num_classes=1000, flip=True, workers=workers, skip_unreadable=True)
    stream = Stream(source, BATCH, seed=0, **options).batches()
    for _ in range(2 + 4 * max(workers, 1)):  # what was read ahead must not count
        next(stream)
    wall, processor = [], []
    for _ in range(rounds):
        start, start_processor = time.perf_counter(), time.process_time()
        for _ in itertools.islice(stream, count):
            pass
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_processor)
    return tuple(count * BATCH / statistics.median(seconds) for seconds in (wall, processor))


def step_images_per_s(rounds: int, batch_size: int = 16) -> float:
    """Images/s of the training step of configs/ppflow_s2.py in float32 on one device."""
    config = ppflow_s2.get_config()
    experiment = Experiment.from_config(config)
    model = experiment.card.model
    tx = make_optimizer(experiment.optim, 1)
    state = jax.jit(lambda key: init_state(model, tx, key))(jax.random.key(0))
    apply = make_apply(model, dtype=np.dtype("float32"), remat="none")
    step = jax.jit(make_train_step(experiment.objective, apply, tx, ema=0.9999), donate_argnums=0)
    batch = {
        "x": np.ones((batch_size, *SHAPE), np.float32),
        "label": np.zeros(batch_size, np.int32),
    }
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        state, metrics = step(state, batch, jax.random.key(1))
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    return batch_size / statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--records", type=int, default=20_480)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step", action="store_true")
    args = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for them

    if not (args.out / "cache" / "manifest.json").exists():
        make_cache(args.out / "cache", args.records)
    cache = open_source("cache", str(args.out / "cache"))
    if args.folder is None:
        args.folder = args.out / "folder"
        if not args.folder.exists():
            make_folder(args.folder, 512)
    folder = open_source("folder", str(args.folder), size=256)
    rows = [("images/s", "threads", "per cpu-s", "1 worker", "2 workers")]
    for name, source, count in (("cached latents 32x32x4", cache, 40), ("JPEG at 256", folder, 8)):
        rates = list(images_per_s(source, 0, count, args.rounds))
        rates += [images_per_s(source, workers, count, args.rounds)[0] for workers in (1, 2)]
        rows.append((name, *(f"{rate:,.0f}" for rate in rates)))
    print(table(rows), flush=True)
    if args.step:
        print(f"PPFlow-S/2 training step: {step_images_per_s(args.rounds):,.1f} images/s")


if __name__ == "__main__":
    main()
