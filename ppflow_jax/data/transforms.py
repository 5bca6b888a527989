"""Image preparation."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def center_crop(image: UInt8[np.ndarray, "h w c"], size: int) -> UInt8[np.ndarray, "s s c"]:
    """ADM centre crop: halve by box filter while twice `size` fits, bicubic to `size`, crop.

    Source: the preprocessing of ADM (arXiv 2105.05233), used by DiT, SiT and PPFlow.
    """
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize(tuple(x // 2 for x in picture.size), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize(
        tuple(round(x * scale) for x in picture.size), Image.Resampling.BICUBIC
    )
    array = np.asarray(picture)
    top, left = ((n - size) // 2 for n in array.shape[:2])
    return array[top : top + size, left : left + size]
