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
