"""Whether examples fit a model, and whether their values can be trained on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ppflow_jax.errors import InputError

VALUES = ("x", "mean", "std")  # what an example may be, if it is no picture of 8 bits
LARGE = 1e4  # latents are of the order of 1


def check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """
    Raises:
      InputError: examples of `name` have another shape (h, w, c) than the model.
    """
    if found != expected:
        raise InputError(
            f"{name} holds examples of shape {found}, the model expects {expected}: "
            "set config.model.latent_size and config.model.channels to the data"
        )


def check_labels(name: str, lo: int, hi: int, num_classes: int) -> None:
    """
    Raises:
      InputError: labels of `name`, from `lo` to `hi`, are not all classes of the model.
    """
    if lo < 0 or hi >= num_classes:
        raise InputError(
            f"{name} has labels from {lo} to {hi}, the model has classes 0 to "
            f"{num_classes - 1}: mend the labels or set config.model.num_classes"
        )


def bad_values(batch: Mapping[str, np.ndarray]) -> tuple[int, str] | None:
    """The first row with values that are not finite or a negative `std`, and what is wrong."""
    for name, values in batch.items():
        if values.dtype.kind != "f":
            continue
        if not (good := np.isfinite(values)).all():
            row = int(np.argmin(good.reshape(len(good), -1).all(axis=1)))
            count = int((~good[row]).sum())
            return row, f"{name} has {count} of {good[row].size} values that are NaN or infinite"
        if name == "std" and values.min() < 0:
            row = int(np.argmin(values.reshape(len(values), -1).min(axis=1)))
            return row, f"std is negative ({values[row].min():.3g})"
    return None


def large_values(batch: Mapping[str, np.ndarray]) -> tuple[int, str] | None:
    """The row with the largest absolute value, if it is above `LARGE`, and what it is."""
    sizes = {n: np.abs(v).reshape(len(v), -1).max(axis=1) for n, v in batch.items() if n in VALUES}
    name = max(sizes, key=lambda n: sizes[n].max(), default=None)
    if name is None or not (largest := sizes[name].max()) > LARGE:
        return None
    return int(np.argmax(sizes[name])), f"{name} has values as large as {largest:.3g}"
