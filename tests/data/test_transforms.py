import struct
import tracemalloc
import zlib

import jax
import numpy as np
import pytest
from PIL import Image

from ppflow_jax.data.transforms import center_crop, decode, to_uint8
from tests.pictures import encoded, pixels

RGB = Image.fromarray(pixels(0))
GRAY = RGB.convert("L")


def gray_as_rgb():
    return np.asarray(GRAY.convert("RGB"))


def with_alpha():
    picture = RGB.convert("RGBA")
    picture.putalpha(100)
    return picture


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(RGB, "png"), np.asarray(RGB)),
        (encoded(with_alpha(), "png"), np.asarray(RGB)),
        (encoded(GRAY, "png"), gray_as_rgb()),
        (encoded(GRAY.convert("LA"), "png"), gray_as_rgb()),
        (encoded(RGB.quantize(8), "png"), np.asarray(RGB.quantize(8).convert("RGB"))),
        (
            encoded(RGB.quantize(8), "png", transparency=bytes([0, 255])),
            np.asarray(RGB.quantize(8).convert("RGB")),
        ),
    ],
    ids=["rgb", "alpha", "gray", "gray+alpha", "palette", "palette+alpha"],
)
def test_every_kind_of_picture_becomes_8_bit_rgb(data, expected):
    np.testing.assert_array_equal(decode(data), expected)


def test_cmyk_becomes_rgb():
    out = decode(encoded(RGB.convert("CMYK"), "jpeg", quality=100)).astype(int)
    assert np.abs(out - np.asarray(RGB)).mean() < 3


def test_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    assert decode(encoded(RGB, "jpeg", exif=exif)).shape == (40, 52, 3)


@pytest.mark.parametrize("cut", [0, 10, 400, -100])
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_truncated_pictures_are_not_decoded(kind, cut):
    data = encoded(RGB, kind)
    assert len(data) > 450
    with pytest.raises(Exception, match=r"(?i)truncated|no picture|broken|incomplete"):
        decode(data[:cut])


@pytest.mark.parametrize("shape", [(1, 1), (9, 30), (64, 64), (200, 70)])
def test_crops_of_any_size_are_square(shape):
    assert center_crop(pixels(0, *shape), 32).shape == (32, 32, 3)


def test_rounding_is_one_on_the_host_and_on_the_device():
    """Also at the edges between two values, where a fused multiply-add would differ."""
    edges = ((np.arange(257) - 128) / 127.5).astype(np.float32)
    x = np.random.default_rng(0).uniform(-1.2, 1.2, 10**6).astype(np.float32)
    x = np.concatenate([x, edges, np.nextafter(edges, np.float32(2))])
    host = to_uint8(x)
    np.testing.assert_array_equal(host, np.clip(127.5 * x + 128, 0, 255).astype(np.uint8))
    np.testing.assert_array_equal(jax.jit(to_uint8)(x), host)
    np.testing.assert_array_equal(to_uint8(jax.numpy.asarray(x)), host)
    some = np.float32([-2, -1, -1 + 1 / 127.5, 0, 0.5 / 127.5, 1, 3])
    assert to_uint8(some).tolist() == [0, 0, 1, 128, 128, 255, 255]


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (Image.fromarray(np.zeros((4, 4), np.uint16)), "not an 8-bit image .Pillow mode I;16"),
        (Image.fromarray(np.zeros((4, 4), np.int32)), "mode I"),
        (Image.fromarray(np.zeros((4, 4), np.float32)), "mode F"),
        (Image.fromarray(np.zeros((3000, 1), np.uint8)), "1x3000 pixels"),
        (Image.fromarray(np.zeros((1, 51), np.uint8)), "51x1 pixels"),
    ],
)
def test_pictures_that_no_rule_makes_8_bit_squares_of_are_refused(picture, words):
    with pytest.raises(ValueError, match=words):
        decode(encoded(picture, "tiff"))


def test_the_most_elongated_picture_costs_little():
    data = encoded(Image.fromarray(pixels(0, 50, 1)), "png")
    tracemalloc.start()
    assert center_crop(decode(data), 256).shape == (256, 256, 3)
    assert tracemalloc.get_traced_memory()[1] < 2e7
    tracemalloc.stop()


def test_16_bit_colours_keep_their_high_byte():
    """Pillow does so on opening; the depth of a colour PNG is declared."""
    size, depth = (2, 2), 16
    rows = b"".join(b"\0" + struct.pack(">6H", *([0x1234, 0xFF00, 0x00FF] * 2)) for _ in range(2))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", *size, depth, 2, 0, 0, 0))]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts
    )
    assert decode(png)[0, 0].tolist() == [0x12, 0xFF, 0x00]
