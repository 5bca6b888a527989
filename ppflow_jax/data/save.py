"""What a person sees of a run: progress bar, metric files, image grids, loss plot."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from ppflow_jax.data import transforms
from ppflow_jax.files.disk import atomic


def to_uint8(images: Float[np.ndarray, "b h w c"], space: str) -> UInt8[np.ndarray, "b h w k"]:
    """Pictures of model outputs, by the rounding of `transforms.to_uint8`.

    Latents have no colours: their first three channels are shown, [-3, 3] to 0..255.
    """
    if space == "latents":
        images = images[..., :3] / 3
    if images.shape[-1] not in (1, 3):
        images = images[..., :1]
    return transforms.to_uint8(images)


def png(image: UInt8[np.ndarray, "h w c"]) -> bytes:
    """The file of one picture, grey or RGB."""
    picture, file = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), io.BytesIO()
    picture.save(file, format="png")
    return file.getvalue()


def save_png(path: Path, image: UInt8[np.ndarray, "h w c"]) -> None:
    """One picture, grey or RGB."""
    with atomic(path) as temporary:
        temporary.write_bytes(png(image))


def save_grid(path: Path, images: UInt8[np.ndarray, "b h w c"], columns: int) -> None:
    """Pictures in rows of `columns`, enlarged to about 64 pixels if they are small."""
    zoom = max(1, 64 // images.shape[1])
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    images = np.pad(images, ((0, -len(images) % columns), (1, 1), (1, 1), (0, 0)))
    b, h, w, c = images.shape
    grid = images.reshape(b // columns, columns, h, w, c).swapaxes(1, 2)
    save_png(path, grid.reshape(b // columns * h, columns * w, c))
