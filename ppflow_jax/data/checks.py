"""Whether examples fit a model."""

from __future__ import annotations

from ppflow_jax.errors import InputError


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
