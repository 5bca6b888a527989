"""Writing a latent cache shard by shard, so that it can be killed at any moment.

While it is made, the folder has `settings.json` and, beside every finished shard, its facts as
`SHARD.json`; the manifest replaces all of them. Shard s is made by process s mod process_count,
always from its first picture and in the same batches: it has the same bytes whether or not
anything was killed before.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ppflow_jax.autoencoders.autoencoder import Autoencoder, Params
from ppflow_jax.autoencoders.encode import Encoder, moments
from ppflow_jax.console import progress, say
from ppflow_jax.data.cache import (
    LABEL_COUNTS,
    MANIFEST,
    WRITER_OPTIONS,
    Manifest,
    Shard,
    encode_record,
    label_counts,
    read_shard,
    sha256,
)
from ppflow_jax.data.classes import Classes
from ppflow_jax.data.pictures import Pictures, UnreadablePicture
from ppflow_jax.data.pipeline import explain, parallel
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Job:
    """What is to be encoded, how, and the part of this process."""

    source: Pictures
    encoder: Encoder
    out: Path
    flips: str
    batch: int
    shard_pictures: int
    process_index: int = 0
    process_count: int = 1

    @property
    def shards(self) -> int:
        return -(-len(self.source) // self.shard_pictures)

    def name(self, shard: int) -> str:
        return f"shard-{shard:05d}-of-{self.shards:05d}.array_record"

    def facts(self, shard: int) -> Path:
        """Where the facts of a finished shard are until the manifest has them."""
        return self.out / f"{self.name(shard)}.json"

    def pictures(self, shard: int) -> range:
        first = shard * self.shard_pictures
        return range(first, min(first + self.shard_pictures, len(self.source)))

    def manifest(
        self, shards: tuple[Shard, ...] = (), labels: dict[str, Any] | None = None
    ) -> Manifest:
        return Manifest(
            dataset=self.source.identity(),
            autoencoder=self.encoder.identity(),
            size=self.source.size,
            flips=self.flips,
            shape=self.encoder.latent_shape(self.source.size),
            std=self.encoder.stochastic,
            latent_scale=self.encoder.latent_scale,
            batch=self.batch,
            shard_pictures=self.shard_pictures,
            shards=shards,
            labels=labels,
        )

    def done(self, shard: int) -> bool:
        """Whether the shard is there as it was written."""
        facts = self.facts(shard)
        return (
            facts.exists() and read_shard(json.loads(facts.read_text())).problem(self.out) is None
        )


def prepare_shards(job: Job, *, skip_unreadable: bool, workers: int) -> None:
    """Make the shards of this process that are not there yet.

    Raises:
      InputError: the folder has a cache, finished or begun, of other settings; a picture cannot
        be read (without `skip_unreadable`); its encoding is not finite.
    """
    _claim(job)
    mine = range(job.process_index, job.shards, job.process_count)
    complete = (job.out / MANIFEST).exists()
    todo = [] if complete else [shard for shard in mine if not job.done(shard)]
    total = sum(len(job.pictures(shard)) for shard in mine)
    left = sum(len(job.pictures(shard)) for shard in todo)
    if left < total and todo:
        say(f"going on: {len(mine) - len(todo)} of {len(mine)} shards are there")
    stream = _encoded(job, todo, workers)
    with contextlib.closing(progress(total, total - left, "img", "prepare")) as bar:
        for shard in todo:
            _write_shard(job, shard, stream, bar, skip_unreadable)


def finish(job: Job) -> Manifest | None:
    """When every process is done, the first one writes the manifest, and gets it."""
    _wait(job, "all shards are written")
    if job.process_index:
        return None
    if not (job.out / MANIFEST).exists():
        shards = range(job.shards)
        facts = [json.loads(job.facts(shard).read_text()) for shard in shards]
        labels = _classes(job, facts).to_json()
        job.manifest(tuple(map(read_shard, facts)), labels).write(job.out)
    for path in [job.out / SETTINGS, *map(job.facts, range(job.shards))]:
        path.unlink(missing_ok=True)
    return Manifest.read(job.out)


def _classes(job: Job, facts: list[dict[str, Any]]) -> Classes:
    """Labels of the pictures that were encoded, and their names."""
    counts: Counter = Counter()
    for fact in facts:
        known = fact.get(LABEL_COUNTS)
        if known is None:  # of a finished cache of which another file was lost
            shape, std = job.encoder.latent_shape(job.source.size), job.encoder.stochastic
            found = label_counts(job.out / fact["name"], shape, std)
            known = {k: n // (2 if job.flips == "both" else 1) for k, n in found.items()}
        counts.update({int(k): n for k, n in known.items()})
    said = job.source.classes()
    return Classes(dict(sorted(counts.items())), said.names if said else ())


def _claim(job: Job) -> None:
    """Settle that this folder is made with these settings.

    A finished cache of which files are missing or cut is begun again with those that are good.
    """
    manifest, begun, settings = job.out / MANIFEST, job.out / SETTINGS, job.manifest().settings()
    finished = Manifest.read(job.out) if manifest.exists() else None
    there = settings
    if finished:
        there = finished.settings()
    elif begun.exists():
        there = json.loads(begun.read_text())
    elif others := [p.name for p in job.out.iterdir() if p.name[0] != "." and p != begun]:
        raise InputError(
            f"{job.out} has other files ({others[0]}): give an empty --out or a new one"
        )
    if different := [name for name in settings if not _same(settings[name], there.get(name))]:
        raise InputError(
            f"{job.out} holds a cache made with other settings ({', '.join(different)}): give "
            "another --out, or the settings it was begun with"
        )
    if not job.process_index:
        for stale in job.out.glob(".*.partial"):
            stale.unlink()  # of processes that were killed
        if not finished:
            _write_json(begun, settings)
        elif any(shard.problem(job.out) for shard in finished.shards):
            _write_json(begun, settings)
            for shard, facts in enumerate(finished.shards):
                _write_json(job.facts(shard), asdict(facts))
            manifest.unlink()
    _wait(job, "the settings are written")


def _same(ours: Any, theirs: Any) -> bool:
    """Equal, but for entries that only one of two dicts has: versions add some."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return all(ours[k] == theirs[k] for k in ours.keys() & theirs.keys())
    return ours == theirs


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n")


def _wait(job: Job, what: str) -> None:
    if job.process_count > 1:
        multihost_utils.sync_global_devices(f"prepare: {what}")


@dataclass(frozen=True)
class _Load:
    """Reads the pictures of a chunk, padded to `rows`; "readable" says which rows hold one."""

    source: Pictures
    rows: int

    def __call__(self, chunk: tuple[int, int]) -> dict[str, np.ndarray]:
        size = self.source.size
        images = np.zeros((self.rows, size, size, 3), np.uint8)
        labels, readable = np.zeros(self.rows, np.int32), np.zeros(self.rows, bool)
        for row, index in enumerate(range(*chunk)):
            try:
                images[row], labels[row] = self.source.load(index)
                readable[row] = True
            except UnreadablePicture:
                pass  # told apart from padding by the reader of the chunk
        return {"image": images, "label": labels, "readable": readable, "chunk": np.array(chunk)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(autoencoder: Autoencoder, both: bool, params: Params, images: jax.Array):
    views = [images, images[:, :, ::-1]] if both else [images]
    return [moments(autoencoder, params, view) for view in views]


def _encoded(job: Job, todo: list[int], workers: int) -> Iterator[dict[str, Any]]:
    """Chunks of the shards in order, with the list "latents": [(mean, std)] per flip.

    A chunk never crosses shards. The devices work on a chunk while the one before is written.
    """
    mesh = Mesh(np.array(jax.local_devices()), "data")
    place = NamedSharding(mesh, P("data"))
    rows = job.batch * mesh.size
    chunks = [
        (first, min(first + rows, pictures.stop))
        for pictures in map(job.pictures, todo)
        for first in range(pictures.start, pictures.stop, rows)
    ]
    autoencoder = job.encoder.autoencoder
    params = jax.device_put(job.encoder.params, NamedSharding(mesh, P()))

    pending = None
    if not chunks:
        return
    for chunk in parallel(grain.MapDataset.source(chunks).map(_Load(job.source, rows)), workers):
        images = jax.device_put(chunk.pop("image"), place)
        latents = _encode(autoencoder, job.flips == "both", params, images)
        if pending:
            yield jax.device_get(pending)
        pending = chunk | {"latents": latents}
    yield jax.device_get(pending)


def _check_finite(job: Job, index: int, *latents: np.ndarray) -> None:
    if not all(np.isfinite(values).all() for values in latents):
        made = job.encoder.identity()
        raise InputError(
            f"{job.source.label_of(index)} of {job.source.name}: its encoding by the autoencoder "
            f"({made['kind']} {made['sha256'][:12]}) is not finite: remove the picture, or convert "
            "the autoencoder again; the shards made so far are kept"
        )


def _write_shard(
    job: Job, shard: int, stream: Iterator[dict[str, Any]], bar: Any, skip_unreadable: bool
) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    path, pictures = job.out / job.name(shard), job.pictures(shard)
    records, labels, unreadable = 0, [], []
    with atomic(path) as temporary:
        writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        try:
            while True:
                chunk = next(stream)
                first, stop = (int(i) for i in chunk["chunk"])
                for row in range(stop - first):
                    if not chunk["readable"][row]:
                        problem = explain(job.source, first + row)
                        if not skip_unreadable:
                            raise InputError(
                                f"cannot read {problem} of {job.source.name}: mend or remove it, "
                                "or give --unreadable=skip; the shards made so far are kept"
                            )
                        unreadable.append(problem)
                        continue
                    label = int(chunk["label"][row])
                    labels.append(label)
                    for mean, std in chunk["latents"]:
                        _check_finite(job, first + row, mean[row], std[row])
                        kept = std[row] if job.encoder.stochastic else None
                        writer.write(encode_record(mean[row], kept, label))
                        records += 1
                bar.update(stop - first)
                if stop == pictures.stop:
                    break
        finally:
            writer.close()
    extremes = (min(labels), max(labels)) if labels else None
    facts = Shard(
        path.name, path.stat().st_size, sha256(path), records, extremes, tuple(unreadable)
    )
    counts = Classes.of(np.int32(labels)).counts
    _write_json(job.facts(shard), asdict(facts) | {LABEL_COUNTS: counts})
