"""Fields: named arrays of the examples besides latent and label, such as features of a teacher.

Beside `latents.npy` a field is NAME.npy of shape (N, ...). In a latent cache it is the folder
`fields/NAME`, written by `prepare --fields` with the shards of the cache: record i belongs to the
latent of record i, so a mirrored latent has the field of the mirrored picture. A record is the
float16 values in row-major order and the int32 label, little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ppflow_jax.data.records import Records
from ppflow_jax.errors import InputError

RESERVED = ("x", "label", "mean", "std", "image", "unreadable")  # other entries of batches
DTYPE = "<f2"


def check_names(fields: tuple[str, ...]) -> None:
    """
    Raises:
      InputError: a name twice, that is no name of a file, or that batches use already.
    """
    for name in fields:
        if not name.isidentifier() or name in RESERVED or fields.count(name) > 1:
            raise InputError(
                f"fields {', '.join(fields)}: names are letters, digits and _, each once, none of "
                f"{', '.join(RESERVED)}"
            )


def folder_of(cache: Path, name: str) -> Path:
    return cache / "fields" / name


@dataclass(frozen=True)
class FieldManifest(Records):
    """What such a folder holds.

    Attributes:
      network: what computed the field.
    """

    what, remedy = "field", "python -m ppflow_jax.prepare --fields"

    network: dict[str, Any]

    @property
    def record_bytes(self) -> int:
        return 2 * int(np.prod(self.shape)) + 4


def record(values: np.ndarray, label: int) -> bytes:
    """One record, see the top of this file."""
    return values.astype(DTYPE).tobytes() + np.int32(label).astype("<i4").tobytes()


class Field:
    """A field of a latent cache, read by number of the record.

    Raises:
      InputError: it is not there, not complete, or of another cache.
    """

    def __init__(self, cache: Path, name: str, latents: Records, stage: str = ""):
        folder = folder_of(cache, name)
        if not folder.is_dir():
            raise InputError(
                f"{cache} has no field {name}: add it with python -m ppflow_jax.prepare "
                f"--out={cache} --path=PICTURES --fields={name}=NETWORK"
            )
        self.name, self.manifest = name, FieldManifest.read(folder)
        if differing := differences(self.manifest, latents):
            raise InputError(
                f"{folder} is not of the pictures of {cache} ({', '.join(differing)} differ): "
                "remove it and make it again with python -m ppflow_jax.prepare --fields"
            )
        self._records = self.manifest.reader(folder, stage)

    def read(self, keys: Int[np.ndarray, " b"], labels: Int[np.ndarray, " b"]) -> np.ndarray:
        """float16 [b, ...] of these records.

        Raises:
          InputError: one belongs to another label than its latent.
        """
        shape = self.manifest.shape
        count = int(np.prod(shape))
        values = np.empty((len(keys), count), DTYPE)
        theirs = np.empty(len(keys), "<i4")
        for row, record in enumerate(self._records.__getitems__(keys.tolist())):
            values[row] = np.frombuffer(record, DTYPE, count)
            theirs[row] = np.frombuffer(record, "<i4", 1, offset=2 * count)[0]
        if (theirs != labels).any():
            row = int(np.argmax(theirs != labels))
            raise InputError(
                f"record {keys[row]} of field {self.name} has label {theirs[row]}, its latent "
                f"{labels[row]}: make the field again"
            )
        return values.reshape(len(keys), *shape)

    def identity(self) -> dict[str, Any]:
        m = self.manifest
        return {"network": m.network, "shape": m.shape, "shards_sha256": m.digest()}


def differences(field: FieldManifest, latents: Records) -> list[str]:
    """In what a field and a cache are not of the same pictures."""
    names = ("size", "flips", "shard_pictures")
    pairs = {n: (getattr(field, n), getattr(latents, n)) for n in names}
    # Where pictures lie is not what they are, and versions add entries
    both = (field.dataset.keys() & latents.dataset.keys()) - {"path"}
    pairs["pictures"] = tuple({k: m.dataset[k] for k in sorted(both)} for m in (field, latents))
    pairs["records"] = tuple([shard.records for shard in m.shards] for m in (field, latents))
    return [name for name, (ours, theirs) in pairs.items() if ours != theirs]
