"""Initial noise that a user gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float

from ppflow_jax.errors import InputError


def load_noise(path: Path, shape: tuple[int, int, int]) -> Float[np.ndarray, "n h w c"]:
    """A float32 NHWC .npy of latents of `shape`.

    Raises:
      InputError: not readable, of another dtype or shape, not finite.
    """
    try:
        noise = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise InputError(f"cannot read --noise={path} ({e}): give a float32 NHWC .npy") from e
    if noise.dtype.kind == "V":
        raise InputError(
            f"--noise={path} is {noise.dtype}, as NumPy saves bfloat16 and float8 without their "
            "name: save float32"
        )
    if noise.dtype != np.float32 or noise.shape[1:] != shape or not len(noise):
        raise InputError(
            f"--noise={path} is {noise.dtype} {noise.shape}, the model needs float32 (N, "
            f"{', '.join(map(str, shape))})"
        )
    if not np.isfinite(noise).all():
        raise InputError(f"--noise={path} has values that are NaN or infinite: make it again")
    return noise
