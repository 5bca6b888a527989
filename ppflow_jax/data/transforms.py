"""From the bytes of a picture to the pixels that are trained on."""

from __future__ import annotations

import io
import warnings

import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image, UnidentifiedImageError

MOST_PIXELS = 2**26  # of one picture; its pixels then take 200 MB
# Pillow's own bound is higher, and between the two it warns of what is refused here
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
MOST_ELONGATED = 50  # longer side over shorter side
_SMALL = {"1", "L", "P", "LA", "PA", "La", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB"}


def check_header(picture: Image.Image) -> None:
    """Whether a picture can be used, by its header alone.

    Raises:
      ValueError: grey of more than 8 bits, whole numbers or floats, whose range no file declares;
        too many pixels; sides too different; an animation.
    """
    width, height = picture.size
    if picture.mode not in _SMALL:
        raise ValueError(f"not an 8-bit image (Pillow mode {picture.mode}): convert it to 8 bits")
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"{width}x{height} pixels, more than {MOST_PIXELS:,} in all: make it smaller"
        )
    if max(width, height) > MOST_ELONGATED * min(width, height):
        raise ValueError(
            f"{width}x{height} pixels, sides that differ by more than {MOST_ELONGATED} times: "
            "cut it"
        )
    # The second frame of an MPO, which cameras write as JPEG, is a preview
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise ValueError("more than one frame: save the one that is meant")


def open_picture(data: bytes) -> Image.Image:
    """A picture of which only the header is read.

    Raises:
      ValueError: of no known format, or see `check_header`.
    """
    try:
        picture = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as e:  # whose own message has an address in it
        raise ValueError("no picture of a known format") from e
    check_header(picture)
    return picture


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """8-bit RGB pixels of an encoded picture of any kind that Pillow reads.

    As the ImageFolder loader of the PyTorch code does: grayscale and palettes become RGB, CMYK is
    converted, alpha is dropped, 16-bit colours keep their high byte, and the EXIF orientation is
    *not* applied (the reference statistics of ImageNet are those of unrotated pictures). Unlike
    there, what is not of 8 bits is refused instead of saturating: see `check_header`.

    Raises:
      Exception: of many types, by Pillow, for what is damaged, truncated or no picture.
    """
    with open_picture(data) as picture:
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
