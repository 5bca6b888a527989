"""Datasets by the name of the configuration, and those that are held in arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ppflow_jax.data.cache import CacheSource
from ppflow_jax.data.checks import check_labels, check_shape
from ppflow_jax.data.classes import Classes
from ppflow_jax.data.fields import check_names
from ppflow_jax.data.parquet import Parquet
from ppflow_jax.data.pictures import Folder, Pictures, Tfds
from ppflow_jax.errors import InputError
from ppflow_jax.files.copies import local_file
from ppflow_jax.files.hub import is_hub
from ppflow_jax.files.place import place

IDENTIFYING = 64  # examples whose values tell two arrays apart


class ArraySource:
    """Examples held in (or memory-mapped from) arrays; `fields` have a row for each of them.

    Raises:
      InputError: shapes or dtypes that are not (N, h, w, c), (N,) and (N, ...).
    """

    def __init__(
        self,
        name: str,
        x: np.ndarray,
        labels: np.ndarray,
        fields: Mapping[str, np.ndarray] = MappingProxyType({}),
    ):
        for what, array in {"examples": x, "labels": labels, **fields}.items():
            if array.dtype.kind == "V":
                raise InputError(
                    f"{name}: {what} are {array.dtype}, as NumPy saves bfloat16 and float8 without "
                    "their name: save them as float32"
                )
        if x.ndim != 4 or x.shape[1] != x.shape[2] or not np.issubdtype(x.dtype, np.floating):
            raise InputError(
                f"{name}: examples must be floating point of shape (N, size, size, channels), "
                f"got {x.dtype} {x.shape}"
            )
        if labels.shape != x.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise InputError(
                f"{name}: labels must be integers of shape ({len(x)},), "
                f"got {labels.dtype} {labels.shape}"
            )
        for field, values in fields.items():
            if values.shape[:1] != x.shape[:1] or not np.issubdtype(values.dtype, np.floating):
                raise InputError(
                    f"{name}: field {field} must be floating point of shape ({len(x)}, ...), "
                    f"got {values.dtype} {values.shape}"
                )
        self.name, self.x, self.labels, self.fields = name, x, labels, dict(fields)

    def __len__(self) -> int:
        return len(self.x)

    def read(
        self, indices: Int[np.ndarray, " b"], flips: Bool[np.ndarray, " b"]
    ) -> dict[str, np.ndarray]:
        """{"x": float32 [b, h, w, c], "label": int32 [b]} and fields; never mirrored."""
        with np.errstate(over="ignore"):  # said of the example, see data/checks.py
            x = np.float32(self.x[indices])
        fields = {name: values[indices] for name, values in self.fields.items()}
        return {"x": x, "label": np.int32(self.labels[indices])} | fields

    def classes(self) -> Classes:
        return Classes.of(self.labels)

    def notes(self) -> list[str]:
        return []

    def identity(self) -> dict[str, Any]:
        """Its digests are of all labels and of some examples, spread over the array."""
        some = np.unique(np.linspace(0, len(self) - 1, IDENTIFYING).astype(int))

        def digest(array: np.ndarray) -> str:
            return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()

        identity = {
            "source": "arrays",
            "name": self.name,
            "examples": len(self),
            "dtype": str(self.x.dtype),
            "labels_sha256": digest(self.labels),
            "some_sha256": digest(self.x[some]),
        }
        fields = {
            name: {"dtype": str(a.dtype), "shape": a.shape[1:], "some_sha256": digest(a[some])}
            for name, a in self.fields.items()
        }
        return identity | ({"fields": fields} if fields else {})

    def check_fits(self, shape: tuple[int, int, int], num_classes: int) -> None:
        """Examples must have the model's shape and labels its classes.

        Raises:
          InputError: they do not.
        """
        check_shape(self.name, self.x.shape[1:], shape)
        check_labels(self.name, int(self.labels.min()), int(self.labels.max()), num_classes)


def digits() -> ArraySource:
    """1,797 handwritten digits, 8x8, shipped inside scikit-learn; pixels in [-1, 1]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images: Float[np.ndarray, "n 8 8"] = data.images
    labels: Int[np.ndarray, " n"] = data.target
    x = (images / 8 - 1).astype(np.float32)[..., None]
    return ArraySource("digits", x, labels.astype(np.int32))


def arrays(path: str, fields: tuple[str, ...] = ()) -> ArraySource:
    """A folder with `latents.npy` (N, size, size, channels), `labels.npy` (N,), NAME.npy (N, ...).

    Latents are memory-mapped, in the scale that the model is to see (Stable Diffusion latents
    times 0.18215); so are `fields`. `sample --save_latents` writes the first two files.

    Raises:
      InputError: a file is absent, unreadable or of another shape.
    """
    folder = place(path)

    def load(name: str, what: str) -> np.ndarray:
        try:
            file = local_file(folder / f"{name}.npy")
            return np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise InputError(f"cannot read {folder / name}.npy ({e}): {what}") from e

    latents, labels = (
        load(
            name,
            "config.data.path must be a folder with latents.npy (N, size, size, channels) and "
            "labels.npy (N,)",
        )
        for name in ("latents", "labels")
    )
    if not len(latents):
        raise InputError(f"{folder}: no examples")
    others = {
        name: load(name, "every one of config.data.fields is a file beside latents.npy")
        for name in fields
    }
    return ArraySource(str(folder), latents, labels, others)


PICTURES = ("folder", "parquet", "tfds")  # that are decoded when they are read
SOURCES = ("arrays", "cache", "digits", *PICTURES)


def open_source(
    name: str,
    path: str,
    *,
    size: int = 0,
    split: str = "train",
    image: str = "image",
    label: str = "label",
    fields: tuple[str, ...] = (),
    stage: str = "",
) -> ArraySource | CacheSource | Pictures:
    """The dataset `name`, one of `SOURCES`, at `path`.

    `size` is the side of pictures after the crop (`PICTURES`); `split`, `image` and `label` are
    the split and features of tfds and parquet; `fields` are those of arrays and caches;
    `stage` is a folder for copies of a cache, parquet or tfds in an object store.

    Raises:
      InputError: unknown name, or a dataset that cannot be used.
    """
    if name not in SOURCES:
        raise InputError(f"unknown data source {name!r}: one of {', '.join(SOURCES)}")
    check_names(fields)
    if fields and name not in ("arrays", "cache"):
        raise InputError(
            f"source {name} has no fields ({', '.join(fields)}): make a latent cache, or of digits "
            "arrays, with python -m ppflow_jax.prepare --fields, and train on that"
        )
    if name == "digits":
        return digits()
    if not path:
        what = {
            "arrays": "DIR with latents.npy and labels.npy",
            "cache": "DIR made by python -m ppflow_jax.prepare",
            "folder": "DIR with one directory per class",
            "parquet": "DIR of Parquet shards or of datasets.save_to_disk, or hf:OWNER/REPO",
            "tfds": "DIR with dataset_info.json, or the name of a prepared dataset",
        }
        raise InputError(f"config.data.path is empty: give --config.data.path={what[name]}")
    if is_hub(path) and name != "parquet":
        raise InputError(f"source {name} does not read the hub ({path}): parquet does")
    if name == "arrays":
        return arrays(path, fields)
    if name == "cache":
        return CacheSource(path, fields, stage)
    if name == "folder":
        return Folder(path, size)
    if name == "parquet":
        return Parquet(path, size, split, image, label, stage)
    return Tfds(path, size, split, image, label, stage)
