"""Datasets by the name of the configuration, and those that are held in arrays."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ppflow_jax.data.cache import CacheSource
from ppflow_jax.data.checks import check_labels, check_shape
from ppflow_jax.data.classes import Classes
from ppflow_jax.data.pictures import Folder, Pictures, Tfds
from ppflow_jax.errors import InputError

IDENTIFYING = 64  # examples whose values tell two arrays apart


class ArraySource:
    """Examples held in (or memory-mapped from) two arrays.

    Raises:
      InputError: shapes or dtypes that are not (N, h, w, c) and (N,).
    """

    def __init__(self, name: str, x: np.ndarray, labels: np.ndarray):
        for what, array in (("examples", x), ("labels", labels)):
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
        self.name, self.x, self.labels = name, x, labels

    def __len__(self) -> int:
        return len(self.x)

    def read(
        self, indices: Int[np.ndarray, " b"], flips: Bool[np.ndarray, " b"]
    ) -> dict[str, np.ndarray]:
        """{"x": float32 [b, h, w, c], "label": int32 [b]}; never mirrored."""
        with np.errstate(over="ignore"):  # said of the example, see data/checks.py
            x = np.float32(self.x[indices])
        return {"x": x, "label": np.int32(self.labels[indices])}

    def classes(self) -> Classes:
        return Classes.of(self.labels)

    def notes(self) -> list[str]:
        return []

    def identity(self) -> dict[str, Any]:
        """Its digests are of all labels and of some examples, spread over the array."""
        some = np.unique(np.linspace(0, len(self) - 1, IDENTIFYING).astype(int))
        labels, x = (
            hashlib.sha256(np.ascontiguousarray(a)).hexdigest() for a in (self.labels, self.x[some])
        )
        return {
            "source": "arrays",
            "name": self.name,
            "examples": len(self),
            "dtype": str(self.x.dtype),
            "labels_sha256": labels,
            "some_sha256": x,
        }

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


def arrays(path: str) -> ArraySource:
    """A folder with `latents.npy` (N, size, size, channels) and `labels.npy` (N,).

    Latents are memory-mapped, in the scale that the model is to see (Stable Diffusion latents
    times 0.18215). `sample --save_latents` writes the same two files.

    Raises:
      InputError: a file is absent, unreadable or of another shape.
    """
    folder = Path(path)
    loaded = []
    for name in ("latents.npy", "labels.npy"):
        try:
            loaded.append(np.load(folder / name, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError) as e:
            raise InputError(
                f"cannot read {folder / name} ({e}): config.data.path must be a folder with "
                "latents.npy (N, size, size, channels) and labels.npy (N,)"
            ) from e
    if not len(loaded[0]):
        raise InputError(f"{folder}: no examples")
    return ArraySource(str(folder), *loaded)


SOURCES = ("arrays", "cache", "digits", "folder", "tfds")


def open_source(
    name: str,
    path: str,
    *,
    size: int = 0,
    split: str = "train",
    image: str = "image",
    label: str = "label",
) -> ArraySource | CacheSource | Pictures:
    """The dataset `name`, one of `SOURCES`, at `path`.

    `size` is the side of pictures after the crop (folder, tfds); `split`, `image` and `label` are
    the split and features of a TFDS dataset.

    Raises:
      InputError: unknown name, or a dataset that cannot be used.
    """
    if name not in SOURCES:
        raise InputError(f"unknown data source {name!r}: one of {', '.join(SOURCES)}")
    if name == "digits":
        return digits()
    if not path:
        what = {
            "arrays": "DIR with latents.npy and labels.npy",
            "cache": "DIR made by python -m ppflow_jax.prepare",
            "folder": "DIR with one directory per class",
            "tfds": "DIR with dataset_info.json, or the name of a prepared dataset",
        }
        raise InputError(f"config.data.path is empty: give --config.data.path={what[name]}")
    if name == "arrays":
        return arrays(path)
    if name == "cache":
        return CacheSource(path)
    if name == "folder":
        return Folder(path, size)
    return Tfds(path, size, split, image, label)
