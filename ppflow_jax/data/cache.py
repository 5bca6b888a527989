"""Latent caches: posterior mean and standard deviation of every picture, in ArrayRecord files.

`prepare` writes them (see records.py). A record is float32 mean [h, w, c], float32 std [h, w, c]
(absent where the autoencoder has none) and int32 label, little-endian, without padding. Latents
are *scaled*: what the model sees. Fields of the same pictures are in `fields/NAME`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ppflow_jax.data.checks import check_labels, check_shape
from ppflow_jax.data.classes import Classes
from ppflow_jax.data.fields import Field
from ppflow_jax.data.records import Records
from ppflow_jax.errors import InputError
from ppflow_jax.files.place import place


@dataclass(frozen=True)
class Manifest(Records):
    """What a cache holds; `shape` is that of a latent, (h, w, c).

    Attributes:
      autoencoder: kind, config and SHA-256 of the parameters that encoded them.
      std: whether records have a standard deviation.
      latent_scale: what the autoencoder's latents were multiplied by.
      labels: a `Classes` as JSON; None in caches of earlier versions.
    """

    what, remedy, loose = "latent cache", "python -m ppflow_jax.prepare", ("labels",)

    autoencoder: dict[str, Any]
    std: bool
    latent_scale: float
    labels: dict[str, Any] | None = None

    @property
    def record_bytes(self) -> int:
        return 4 * int(np.prod(self.shape)) * (1 + self.std) + 4

    def check_autoencoder(self, name: str, other: dict[str, Any] | None, text: str) -> None:
        """The autoencoder `text`, if one is asked for, must be the one that made the cache.

        Raises:
          InputError: it is not.
        """
        if other is not None and other != self.autoencoder:
            ours, theirs = (f"{a['kind']} {a['sha256'][:12]}" for a in (self.autoencoder, other))
            raise InputError(
                f"{name} was made with another autoencoder ({ours}) than config.data.vae={text} "
                f"({theirs}): prepare a cache with that one, or leave config.data.vae empty"
            )


def encode_record(
    mean: Float[np.ndarray, "h w c"], std: Float[np.ndarray, "h w c"] | None, label: int
) -> bytes:
    """One record, see the top of this file."""
    parts = [mean] if std is None else [mean, std]
    return (
        b"".join(p.astype("<f4").tobytes() for p in parts) + np.int32(label).astype("<i4").tobytes()
    )


class CacheSource:
    """A latent cache, read in whole batches; `fields` are those of it that are read too.

    One in an object store is read by ranges, or from copies in the folder `stage`.

    Raises:
      InputError: no complete cache, or files that are not those of its manifest.
    """

    def __init__(self, path: str, fields: tuple[str, ...] = (), stage: str = ""):
        folder = place(path).absolute()
        self.name, self.manifest = path, Manifest.read(folder)
        self._records = self.manifest.reader(folder, stage)
        if not self.manifest.records:
            raise InputError(f"{path}: no examples")
        self.fields = [Field(folder, name, self.manifest, stage) for name in fields]

    def __len__(self) -> int:
        """Pictures, not records."""
        return self.manifest.pictures

    def read(
        self, indices: Int[np.ndarray, " b"], flips: Bool[np.ndarray, " b"]
    ) -> dict[str, np.ndarray]:
        """{"mean", "std": float32 [b, h, w, c], "label": int32 [b]}, or {"x", "label"} without std.

        Besides, float16 [b, ...] of every field. Flips are taken where the cache has both.
        """
        shape, m = self.manifest.shape, self.manifest
        keys = indices * 2 + flips if m.views == 2 else indices
        words = int(np.prod(shape)) * (1 + m.std)
        # Copied row by row: about four times faster than joining the records
        latents = np.empty((len(keys), 1 + m.std, *shape), "<f4")
        labels = np.empty(len(keys), "<i4")
        flat = latents.reshape(len(keys), words)
        for row, record in enumerate(self._records.__getitems__(keys.tolist())):
            flat[row] = np.frombuffer(record, "<f4", words)
            labels[row] = np.frombuffer(record, "<i4", 1, offset=4 * words)[0]
        batch = {field.name: field.read(keys, labels) for field in self.fields}
        if not m.std:
            return {"x": latents[:, 0], "label": labels} | batch
        return {"mean": latents[:, 0], "std": latents[:, 1], "label": labels} | batch

    def classes(self) -> Classes | None:
        labels = self.manifest.labels
        return None if labels is None else Classes.from_json(labels)

    def notes(self) -> list[str]:
        left = len(self.manifest.unreadable)
        return [f"{self.name}: left out {left:,} pictures that could not be read"] if left else []

    def identity(self) -> dict[str, Any]:
        """What the latents and fields are: what they were made from, and digests of the files."""
        m = self.manifest
        identity = {
            "source": "cache",
            "dataset": m.dataset,
            "autoencoder": m.autoencoder,
            "size": m.size,
            "flips": m.flips,
            "pictures": m.pictures,
            "shards_sha256": m.digest(),
        }
        fields = {field.name: field.identity() for field in self.fields}
        return identity | ({"fields": fields} if fields else {})

    def check_fits(self, shape: tuple[int, int, int], num_classes: int) -> None:
        """Latents must have the model's shape and labels its classes.

        Raises:
          InputError: they do not.
        """
        ranges = [s.labels for s in self.manifest.shards if s.labels is not None]
        lo, hi = min(r[0] for r in ranges), max(r[1] for r in ranges)
        check_shape(self.name, self.manifest.shape, shape)
        check_labels(self.name, lo, hi, num_classes)
