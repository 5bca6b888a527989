"""Values of conditions that a user gives, by image number."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float

from ppflow_jax.data.images import folder_images
from ppflow_jax.errors import InputError
from ppflow_jax.models.conditions import Condition
from ppflow_jax.models.config import ModelConfig


def load_conditions(path: Path, model: ModelConfig) -> dict[str, Float[np.ndarray, "n ..."]]:
    """Values of all the model's conditions, float32, image number first.

    Args:
      path: FILE.npz with an array of each condition's name, or a folder with NAME.npy or, for
        conditions of 1 or 3 channels, a folder NAME of pictures: sorted by name, of the latent's
        size, pixels in [-1, 1].

    Raises:
      InputError: not there, not readable, or no values of one of the conditions.
    """
    if not model.asked:
        raise InputError(f"--conditions={path}: the model has no conditions: leave it out")
    if not path.exists():
        raise InputError(f"--conditions={path} does not exist: give an .npz file or a folder")
    if path.is_dir():
        return {c.name: _from_folder(path, c) for c in model.asked}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as e:
        raise InputError(f"cannot read --conditions={path} ({e}): give an .npz file") from e
    names = [c.name for c in model.asked]
    if missing := [name for name in names if name not in found]:
        raise InputError(
            f"--conditions={path} has {', '.join(found) or 'nothing'}, the model needs "
            f"{', '.join(names)}: add {', '.join(missing)}"
        )
    return {name: found[name] for name in names}


def _from_folder(path: Path, condition: Condition) -> np.ndarray:
    file, folder = path / f"{condition.name}.npy", path / condition.name
    if file.exists():
        try:
            return np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise InputError(f"cannot read {file} ({e}): give a float32 .npy") from e
    if not folder.is_dir():
        raise InputError(f"--conditions={path} has neither {file.name} nor a folder {folder.name}")
    images = folder_images(str(folder))
    return np.concatenate(list(images.batches(256))).astype(np.float32) / 127.5 - 1


def digest_of(values: Mapping[str, np.ndarray]) -> str:
    """Of names and numbers."""
    sums = [f"{k} {hashlib.sha256(v.tobytes()).hexdigest()}" for k, v in sorted(values.items())]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()
