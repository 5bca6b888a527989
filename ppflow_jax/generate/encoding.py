"""Pictures to latents or features, chunk by chunk, on all devices of a process."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ppflow_jax.autoencoders.autoencoder import Params
from ppflow_jax.autoencoders.encode import Encoder, moments
from ppflow_jax.data.cache import Manifest, encode_record
from ppflow_jax.data.pictures import Pictures, UnreadablePicture
from ppflow_jax.data.pipeline import parallel
from ppflow_jax.data.records import Records, Shard, read_shard
from ppflow_jax.errors import InputError
from ppflow_jax.files.shards import Shards


@runtime_checkable
class Made(Protocol):
    """What is made of pictures; hashable parts are static in the program that makes it.

    Attributes:
      params: of the network that makes it.
      function: (params, uint8 pictures) -> arrays [b, ...].
    """

    params: Params
    function: Callable[[Params, jax.Array], tuple[jax.Array, ...]]

    def manifest(self, facts: dict[str, Any], labels: dict[str, Any] | None) -> Records:
        """Of these facts, which all manifests have; `labels` is a `Classes` as JSON."""
        ...

    def record(self, values: tuple[np.ndarray, ...], label: int) -> bytes:
        """Of one view of one picture."""
        ...

    def name(self) -> str:
        """Of what computes it, for messages."""
        ...


@dataclass(frozen=True)
class Latents:
    """The latents of an autoencoder."""

    encoder: Encoder
    size: int

    @property
    def params(self) -> Params:
        return self.encoder.params

    @property
    def function(self) -> Callable[[Params, jax.Array], tuple[jax.Array, ...]]:
        return functools.partial(moments, self.encoder.autoencoder)

    def manifest(self, facts: dict[str, Any], labels: dict[str, Any] | None) -> Manifest:
        return Manifest(
            **facts,
            autoencoder=self.encoder.identity(),
            shape=self.encoder.latent_shape(self.size),
            std=self.encoder.stochastic,
            latent_scale=self.encoder.latent_scale,
            labels=labels,
        )

    def record(self, values: tuple[np.ndarray, ...], label: int) -> bytes:
        mean, std = values
        return encode_record(mean, std if self.encoder.stochastic else None, label)

    def name(self) -> str:
        made = self.encoder.identity()
        return f"the autoencoder ({made['kind']} {made['sha256'][:12]})"


@dataclass(frozen=True)
class Job:
    """What is to be made of which pictures, and the part of this process."""

    source: Pictures
    made: Made
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
    ) -> Records:
        facts = {
            "dataset": self.source.identity(),
            "size": self.source.size,
            "flips": self.flips,
            "batch": self.batch,
            "shard_pictures": self.shard_pictures,
            "shards": shards,
        }
        return self.made.manifest(facts, labels)

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


def encoded(job: Job, todo: list[int], workers: int) -> Iterator[dict[str, Any]]:
    """Chunks of the shards in order, with "made": a tuple of arrays for every flip.

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
    params = jax.device_put(job.made.params, NamedSharding(mesh, P()))
    function, both = job.made.function, job.flips == "both"

    @jax.jit
    def views(params, images):
        return [function(params, view) for view in [images, *[images[:, :, ::-1]] * both]]

    pending = None
    if not chunks:
        return
    for chunk in parallel(grain.MapDataset.source(chunks).map(_Load(job.source, rows)), workers):
        images = jax.device_put(chunk.pop("image"), place)
        made = views(params, images)
        if pending:
            yield jax.device_get(pending)
        pending = chunk | {"made": made}
    yield jax.device_get(pending)


def check_finite(job: Job, index: int, values: tuple[np.ndarray, ...]) -> None:
    if not all(np.isfinite(array).all() for array in values):
        raise InputError(
            f"{job.source.label_of(index)} of {job.source.name}: its encoding by {job.made.name()} "
            "is not finite: remove the picture, or convert the weights again; the shards made so "
            "far are kept"
        )
