"""Pictures to latents, chunk by chunk, on all devices of a process."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ppflow_jax.autoencoders.autoencoder import Autoencoder, Params
from ppflow_jax.autoencoders.encode import Encoder, moments
from ppflow_jax.data.cache import (
    Manifest,
    Shard,
    read_shard,
)
from ppflow_jax.data.pictures import Pictures, UnreadablePicture
from ppflow_jax.data.pipeline import parallel
from ppflow_jax.errors import InputError
from ppflow_jax.files.shards import Shards


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
    def shards(self) -> Shards:
        return Shards(self.out, len(self.source), self.shard_pictures, self._done)

    def name(self, shard: int) -> str:
        return f"shard-{shard:05d}-of-{len(self.shards):05d}.array_record"

    def facts(self, shard: int) -> Path:
        """Where the facts of a finished shard are until the manifest has them."""
        return self.out / f"{self.name(shard)}.json"

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

    def _done(self, shard: int) -> bool:
        facts = self.facts(shard)
        return (
            facts.exists() and read_shard(json.loads(facts.read_text())).problem(self.out) is None
        )


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


def encoded(job: Job, todo: list[int], workers: int) -> Iterator[dict[str, Any]]:
    """Chunks of the shards in order, with the list "latents": [(mean, std)] per flip.

    A chunk never crosses shards. The devices work on a chunk while the one before is written.
    """
    mesh = Mesh(np.array(jax.local_devices()), "data")
    place = NamedSharding(mesh, P("data"))
    rows = job.batch * mesh.size
    chunks = [
        (first, min(first + rows, pictures.stop))
        for pictures in map(job.shards.records, todo)
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


def check_finite(job: Job, index: int, *latents: np.ndarray) -> None:
    if not all(np.isfinite(values).all() for values in latents):
        made = job.encoder.identity()
        raise InputError(
            f"{job.source.label_of(index)} of {job.source.name}: its encoding by the autoencoder "
            f"({made['kind']} {made['sha256'][:12]}) is not finite: remove the picture, or convert "
            "the autoencoder again; the shards made so far are kept"
        )
