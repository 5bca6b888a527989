"""Datasets as random-access sources of {"x": float32 [h, w, c], "label": int32}."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from ppflow_jax.errors import InputError


class ArraySource:
    """Examples held in (or memory-mapped from) two arrays.

    Raises:
      InputError: shapes or dtypes that are not (N, h, w, c) and (N,).
    """

    def __init__(self, name: str, x: np.ndarray, labels: np.ndarray):
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

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        i = int(index)
        return {"x": np.asarray(self.x[i], np.float32), "label": np.int32(self.labels[i])}

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.x.shape[1:]

    def check_fits(self, shape: tuple[int, int, int], num_classes: int) -> None:
        """Examples must have the model's shape and labels its classes.

        Raises:
          InputError: they do not.
        """
        if self.shape != shape:
            raise InputError(
                f"{self.name} holds examples of shape {self.shape}, the model expects {shape}: "
                "set config.model.latent_size and config.model.channels to the data"
            )
        lo, hi = int(self.labels.min()), int(self.labels.max())
        if lo < 0 or hi >= num_classes:
            raise InputError(
                f"{self.name} has labels from {lo} to {hi}, the model has classes 0 to "
                f"{num_classes - 1}: mend the labels or set config.model.num_classes"
            )


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


def open_source(name: str, path: str) -> ArraySource:
    """`digits`, or `arrays` at `path`.

    Raises:
      InputError: unknown name, or an `arrays` folder that cannot be used.
    """
    if name == "digits":
        return digits()
    if name == "arrays":
        if not path:
            raise InputError(
                "config.data.path is empty: give --config.data.path=DIR with latents.npy "
                "and labels.npy"
            )
        return arrays(path)
    raise InputError(f"unknown data source {name!r}: one of digits, arrays")
