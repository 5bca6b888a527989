"""Sets of pictures to judge: an ADM-style npz, a folder, or a source of the project."""

from __future__ import annotations

import functools
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BufferedIOBase
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from ppflow_jax.data.image_tree import CARD, EXTENSIONS, ImageTree, open_tree
from ppflow_jax.data.parquet import Parquet
from ppflow_jax.data.pictures import UnreadablePicture
from ppflow_jax.data.pipeline import Source
from ppflow_jax.data.sources import arrays, digits
from ppflow_jax.data.table_files import PARQUET
from ppflow_jax.data.transforms import center_crop, decode, open_picture, to_uint8
from ppflow_jax.errors import InputError
from ppflow_jax.files.copies import given
from ppflow_jax.files.place import ObjectPath, place

_GREY = ("1", "L")
_THREADS = 8


@dataclass(frozen=True)
class ImageSet:
    """Pictures of one shape (h, w, c), read anew every time `batches` is called.

    Attributes:
      read: (batch size, number of the first picture) -> batches.
      notes: what was left out.
      files: that the pictures are in; empty for what is in memory.
    """

    name: str
    count: int
    shape: tuple[int, int, int]
    read: Callable[[int, int], Iterator[UInt8[np.ndarray, "b h w c"]]]
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def batches(self, size: int, first: int = 0) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        """In order from number `first` on, `size` at a time, the last one smaller.

        Raises:
          InputError: a picture that cannot be read.
        """
        return self.read(size, first)

    def __str__(self) -> str:
        return f"{self.name} ({self.count:,} images, {'x'.join(map(str, self.shape))})"


def open_images(text: str, size: int | None = None) -> ImageSet:
    """`digits`; FILE.npz with `arr_0`; a folder or .zip of pictures; Parquet shards, see
    table_files.py; a folder that `sample` made; a folder of latents.npy in [-1, 1].

    With `size` every picture of a folder gets ADM's centre crop; without, all must have one size.

    Raises:
      InputError: not there, empty, of mixed sizes, or not 8-bit pictures.
    """
    path = place(text)
    if text.endswith(PARQUET):
        return table_images(text, size)
    if text != "digits" and not path.exists():
        raise InputError(
            f"{text} does not exist: give an npz with arr_0, a folder of images, or digits"
        )
    if path.is_dir() and is_sample_folder(path):
        text, path = f"{text}/samples.npz", path / "samples.npz"
    if path.suffix.lower() == ".zip" or (path.is_dir() and not (path / "latents.npy").exists()):
        return folder_images(text, size)
    if size is not None:
        raise InputError(f"--size={size} crops folders of images, {text} is none: leave it out")
    if path.is_file() and isinstance(path, ObjectPath):  # features of copies are not kept
        return replace(npz_images(given(text)), name=text, files=())
    if path.is_file():
        return npz_images(path)
    return source_images(digits() if text == "digits" else arrays(text))


def is_sample_folder(path: Path) -> bool:
    """Whether `sample` made it; its pictures are those of samples.npz.

    Raises:
      InputError: it is not complete.
    """
    try:
        complete = json.loads((path / CARD).read_text())["complete"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # somebody else's card, or none
    if not complete or not (path / "samples.npz").exists():
        raise InputError(
            f"{path} is a folder of samples that is not complete: run its sample command again, "
            f"or give {path}/images"
        )
    return True


def source_pictures(
    source: Source, index: Int[np.ndarray, " b"]
) -> tuple[UInt8[np.ndarray, "b h w c"], Int[np.ndarray, " b"]]:
    """Pictures and labels of some examples of the training data, never mirrored.

    Raises:
      InputError: latents, or a picture that cannot be read.
    """
    try:
        batch = source.read(index, np.zeros(len(index), bool))
    except UnreadablePicture as error:
        raise InputError(f"{source.name}: {error}: mend or remove it") from error
    if "mean" in batch or ("x" in batch and batch["x"].shape[-1] not in (1, 3)):
        raise InputError(
            f"{source.name} holds latents, which are no pictures: decode them first (python -m "
            "ppflow_jax.sample --decode), or give a folder of pictures"
        )
    return batch["image"] if "image" in batch else to_uint8(batch["x"]), batch["label"]


def source_images(source: Source) -> ImageSet:
    """All examples of the training data, which are pictures.

    Raises:
      InputError: see `source_pictures`.
    """

    def read(size, first):
        for k in range(first, len(source), size):
            yield source_pictures(source, np.arange(k, min(k + size, len(source))))[0]

    shape = source_pictures(source, np.arange(1))[0].shape[1:]
    return ImageSet(source.name, len(source), shape, read)


def table_images(path: str, size: int | None) -> ImageSet:
    """The column `image` of Parquet shards, or of the only split that `datasets` saved.

    Raises:
      InputError: no `size`; see `Parquet` and `source_pictures`.
    """
    if size is None:
        raise InputError(f"{path}: give --size=N for ADM's centre crop to NxN")
    source = Parquet(path, size, split="", image="image", label="")
    return replace(source_images(source), notes=tuple(source.notes()))


def npz_images(path: Path) -> ImageSet:
    """`arr_0` of an npz, uint8 (N, h, w, 1 or 3); it is streamed, never held whole.

    Raises:
      InputError: no npz, no `arr_0`, or another dtype or shape.
    """

    def header(file: BufferedIOBase) -> tuple[tuple[int, ...], bool, np.dtype]:
        version = np.lib.format.read_magic(file)
        reader = {(1, 0): np.lib.format.read_array_header_1_0}
        return reader.get(version, np.lib.format.read_array_header_2_0)(file)

    try:
        with zipfile.ZipFile(path) as archive:
            names = [n.removesuffix(".npy") for n in archive.namelist()]
            if "arr_0" not in names:
                raise InputError(
                    f"{path} holds {', '.join(names) or 'nothing'}: expected images as arr_0, "
                    "uint8 (N, height, width, 3), as numpy.savez makes them"
                )
            with archive.open("arr_0.npy") as file:
                shape, fortran, dtype = header(file)
    except (OSError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {path} ({error}): expected an npz with arr_0") from error
    if dtype != np.uint8:
        raise InputError(
            f"{path}: arr_0 is {dtype}, expected uint8 from 0 to 255: round samples before "
            "(ppflow_jax.data.transforms.to_uint8), the rounding changes FID"
        )
    if fortran:
        raise InputError(
            f"{path}: arr_0 is in Fortran order, which cannot be read in parts: save "
            "numpy.ascontiguousarray of it"
        )
    if len(shape) != 4 or shape[3] not in (1, 3) or not all(shape):
        raise InputError(f"{path}: arr_0 has shape {shape}, expected (N, height, width, 1 or 3)")

    def read(size, first):
        row = int(np.prod(shape[1:]))
        try:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
                header(file)
                file.seek(first * row, os.SEEK_CUR)
                for k in range(first, shape[0], size):
                    count = min(size, shape[0] - k)
                    data = file.read(count * row)
                    yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:])
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is damaged ({error}): make or copy it again") from error

    return ImageSet(str(path), shape[0], tuple(shape[1:]), read, files=(path.absolute(),))


def folder_images(path: str, size: int | None = None) -> ImageSet:
    """All pictures of a folder or .zip, at any depth; grey if all are, else RGB.

    Raises:
      InputError: none there, mixed sizes without `size`, one that cannot be used, a folder above
        folders of samples.
    """
    tree = open_tree(path)
    if inner := sorted(o for o in tree.others if o.endswith(f"/{CARD}")):
        raise InputError(
            f"{path} has {inner[0]}, of a folder of samples: give {path}/{inner[0][: -len(CARD)]}"
        )
    if not tree.files and any(other.endswith((PARQUET, ".arrow")) for other in tree.others):
        return table_images(path, size)
    if not tree.files:
        raise InputError(f"{path} has no images ({', '.join(EXTENSIONS)})")
    with ThreadPoolExecutor(_THREADS) as pool:
        headers = list(pool.map(functools.partial(_header, tree), tree.files))
    grey = all(mode in _GREY for _, mode in headers)
    sizes = {found: file for file, (found, _) in zip(tree.files[::-1], headers[::-1])}
    if size is None and len(sizes) > 1:
        (a, first), (b, second) = sorted(sizes.items(), key=lambda item: item[1])[:2]
        raise InputError(
            f"{path} has images of {len(sizes)} sizes, such as {a[0]}x{a[1]} ({first}) and "
            f"{b[0]}x{b[1]} ({second}): give --size=N for ADM's centre crop to NxN"
        )
    width, height = (size, size) if size else headers[0][0]

    def load(file: str) -> np.ndarray:
        try:
            pixels = decode(tree.read(file))
            return (center_crop(pixels, size) if size else pixels)[..., : 1 if grey else 3]
        # Pillow has many exceptions for broken files, among them SyntaxError and struct.error
        except Exception as error:
            raise _unusable(tree, file, error) from error

    def read(batch, first):
        parts = [tree.files[i : i + batch] for i in range(first, len(tree.files), batch)]
        with ThreadPoolExecutor(_THREADS) as pool:
            waiting = [pool.submit(load, file) for file in parts[0]]
            for following in [*parts[1:], []]:
                ahead = [pool.submit(load, file) for file in following]
                yield np.stack([future.result() for future in waiting])
                waiting = ahead

    shape = (height, width, 1 if grey else 3)
    if isinstance(tree.root, ObjectPath):
        return ImageSet(path, len(tree.files), shape, read, tuple(tree.notes()))
    files = (tree.root,) if tree.zipped else tuple(tree.root / file for file in tree.files)
    return ImageSet(path, len(tree.files), shape, read, tuple(tree.notes()), files)


def _header(tree: ImageTree, file: str) -> tuple[tuple[int, int], str]:
    try:
        with open_picture(tree.read(file)) as picture:
            return picture.size, picture.mode
    except Exception as error:
        raise _unusable(tree, file, error) from error


def _unusable(tree: ImageTree, file: str, error: Exception) -> InputError:
    return InputError(f"cannot read image {tree.name}/{file} ({error}): mend or remove it")


def as_channels(
    images: UInt8[np.ndarray, "b h w c"], channels: int
) -> UInt8[np.ndarray, "b h w k"]:
    """Grey pictures as RGB, or RGB ones without colours as grey.

    Raises:
      InputError: colours where grey is wanted.
    """
    if images.shape[-1] == channels:
        return images
    if channels == 1 and (images != images[..., :1]).any():
        raise InputError(
            "the images have colours, this feature network was trained on grey ones: give "
            "--features of an Inception, or of a network trained on such pictures"
        )
    return images[..., :1] if channels == 1 else np.repeat(images, channels, axis=-1)


def array_images(name: str, images: UInt8[np.ndarray, "n h w c"]) -> ImageSet:
    """Pictures that are in memory."""

    def read(size, first):
        for k in range(first, len(images), size):
            yield images[k : k + size]

    return ImageSet(name, len(images), images.shape[1:], read)
