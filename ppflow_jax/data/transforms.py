"""From the bytes of a picture to the pixels that are trained on."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image, UnidentifiedImageError


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """8-bit RGB pixels of an encoded picture of any kind that Pillow reads.

    As the ImageFolder loader of the PyTorch code does: grayscale and palettes become RGB, CMYK is
    converted, alpha is dropped, and the EXIF orientation is *not* applied (the reference
    statistics of ImageNet are those of unrotated pictures). Unlike there, 16-bit grayscale keeps
    its high byte instead of saturating.

    Raises:
      Exception: of many types, by Pillow, for what is damaged, truncated or no picture.
    """
    try:
        picture = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as e:  # whose own message has an address in it
        raise ValueError("no picture of a known format") from e
    with picture:
        if picture.mode == "I" or picture.mode.startswith("I;16"):
            high = np.asarray(picture) >> 8
            return np.repeat(np.clip(high, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)
        if "transparency" in picture.info:
            picture = picture.convert("RGBA")
        return np.asarray(picture.convert("RGB"))


def to_uint8(
    images: Float[np.ndarray, "*shape"] | Float[Array, "*shape"],
) -> UInt8[np.ndarray, "*shape"] | UInt8[Array, "*shape"]:
    """[-1, 1] -> 0..255: clamp(127.5 x + 128, 0, 255), truncated; of NumPy or of JAX arrays.

    The one rounding of this project, that of ADM, DiT, SiT and PPFlow samples. Codes with
    (x + 1) / 2 * 255 get other pixels and another FID.
    """
    # 127.5 x is written with exact products: the compiler may fuse it with the sum or not, and the
    # device still gives the pixels that NumPy gives.
    return ((256.0 * images - images) * 0.5 + 128.0).clip(0, 255).astype("uint8")


def center_crop(image: UInt8[np.ndarray, "h w *c"], size: int) -> UInt8[np.ndarray, "s s *c"]:
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
