"""Sets of pictures: what is read, and the one line for what cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ppflow_jax.data.images import array_images, as_channels, open_images
from ppflow_jax.errors import InputError

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (7, 6, 8, 3), np.uint8)


def everything(images, size=3):
    parts = list(images.batches(size))
    assert [len(p) for p in parts] == [3, 3, 1]
    return np.concatenate(parts)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "pictures"
    for k, picture in enumerate(PICTURES):
        file = path / f"class{k // 4}" / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    (path / "notes.txt").write_text("no picture")
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_in_parts(tmp_path, save):
    save(tmp_path / "a.npz", arr_0=PICTURES, arr_1=np.arange(7))
    images = open_images(str(tmp_path / "a.npz"))
    assert (images.count, images.shape) == (7, (6, 8, 3))
    for _ in range(2):
        np.testing.assert_array_equal(everything(images), PICTURES)


def test_folders_are_read_in_the_order_of_their_names(folder):
    images = open_images(str(folder))
    assert (images.count, images.shape) == (7, (6, 8, 3))
    np.testing.assert_array_equal(everything(images), PICTURES)


def test_grey_and_colour(folder, tmp_path):
    Image.fromarray(PICTURES[0, ..., 0]).save(folder / "class0" / "0.png")
    first = everything(open_images(str(folder)))[0]
    np.testing.assert_array_equal(first, PICTURES[0, ..., :1].repeat(3, axis=-1))
    grey = tmp_path / "grey"
    grey.mkdir()
    Image.fromarray(PICTURES[0, ..., 0]).save(grey / "0.png")
    images = open_images(str(grey), 4)
    assert images.shape == (4, 4, 1)
    assert next(images.batches(9)).shape == (1, 4, 4, 1)
    np.testing.assert_array_equal(
        as_channels(PICTURES[..., :1].repeat(3, -1), 1), PICTURES[..., :1]
    )
    with pytest.raises(InputError, match="have colours"):
        as_channels(PICTURES, 1)


def test_crop_makes_one_size_of_many(folder):
    Image.fromarray(PICTURES[0].repeat(3, 0).repeat(2, 1)).save(folder / "class0" / "0.png")
    with pytest.raises(InputError, match=r"2 sizes, such as 16x18 \(class0/0\.png\) and 8x6"):
        open_images(str(folder))
    images = open_images(str(folder), 5)
    assert images.shape == (5, 5, 3) and everything(images).shape == (7, 5, 5, 3)


def test_sources_are_rounded_as_samples_are(tmp_path):
    digits = open_images("digits")
    assert (digits.count, digits.shape) == (1797, (8, 8, 1))
    first = next(digits.batches(50))
    assert first.dtype == np.uint8 and first.min() == 0 and first.max() == 255
    np.save(tmp_path / "latents.npy", np.zeros((3, 4, 4, 1), np.float32))
    np.save(tmp_path / "labels.npy", np.zeros(3, int))
    assert (
        next(open_images(str(tmp_path)).batches(2)).tolist() == np.full((2, 4, 4, 1), 128).tolist()
    )
    np.save(tmp_path / "latents.npy", np.zeros((3, 4, 4, 4), np.float32))
    with pytest.raises(InputError, match="holds latents, which are no pictures"):
        open_images(str(tmp_path))


def test_pictures_in_memory():
    np.testing.assert_array_equal(everything(array_images("some", PICTURES)), PICTURES)


def _npz(path, **arrays):
    np.savez(path / "bad.npz", **arrays)
    return path / "bad.npz"


def _text(path):
    (path / "bad.npz").write_text("no npz")
    return path / "bad.npz"


def _empty(path):
    (path / "empty").mkdir()
    return path / "empty"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: d / "nothing", "does not exist"),
        (_empty, "has no images"),
        (_text, "cannot read"),
        (lambda d: _npz(d, images=PICTURES), "holds images: expected images as arr_0"),
        (lambda d: _npz(d, arr_0=PICTURES / np.float32(255)), "float32, expected uint8"),
        (lambda d: _npz(d, arr_0=PICTURES.astype(int)), "int64, expected uint8"),
        (lambda d: _npz(d, arr_0=PICTURES[0]), r"shape \(6, 8, 3\), expected \(N"),
        (lambda d: _npz(d, arr_0=PICTURES[:0]), r"shape \(0, 6, 8, 3\)"),
        (lambda d: _npz(d, arr_0=PICTURES.transpose(0, 3, 1, 2)), r"shape \(7, 3, 6, 8\)"),
    ],
)
def test_what_is_refused_before_reading(tmp_path, make, words):
    with pytest.raises(InputError, match=words) as error:
        open_images(str(make(tmp_path)))
    assert "\n" not in str(error.value)


def test_damage_in_the_middle_names_the_file(folder, tmp_path):
    file = folder / "class1" / "5.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:-60])  # the header is good
    with pytest.raises(InputError, match=r"cannot read image .*5\.png .*remove it"):
        list(open_images(str(folder)).batches(3))
    file.write_bytes(b"GIF89a")
    with pytest.raises(InputError, match=r"cannot read image .*5\.png"):
        open_images(str(folder))
    Image.fromarray(PICTURES[0, ..., 0].astype(np.uint16) * 200).save(file)
    with pytest.raises(InputError, match="not an 8-bit image"):
        open_images(str(folder))
    path = _npz(tmp_path, arr_0=PICTURES.repeat(100, axis=0))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="is damaged"):
        list(open_images(str(path)).batches(3))
    with pytest.raises(InputError, match="leave it out"):
        open_images(str(path), 4)
