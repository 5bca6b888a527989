"""Datasets of encoded pictures, decoded when they are read: image folders and TFDS."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

from ppflow_jax.data.classes import Classes, labelled
from ppflow_jax.data.image_tree import open_tree
from ppflow_jax.data.transforms import center_crop, decode
from ppflow_jax.errors import InputError
from ppflow_jax.files.mirror import Mirror
from ppflow_jax.files.objects import StoreError
from ppflow_jax.files.place import ObjectPath, is_object, place

_TFDS_CARD = "dataset_info.json"


class UnreadablePicture(Exception):
    """One picture that cannot be decoded; the message is its name and why."""


class Pictures:
    """Random access to pictures of `size` x `size` pixels; the kinds of dataset derive from it.

    Attributes:
      name: for messages.
      size: side of the ADM centre crop, pixels.
      num_classes: labels are 0 to num_classes - 1; None if the dataset does not say.
    """

    name: str
    size: int
    num_classes: int | None

    def __len__(self) -> int:
        raise NotImplementedError

    def fetch(self, index: int) -> tuple[bytes, int]:
        """Encoded picture and its label."""
        raise NotImplementedError

    def label_of(self, index: int) -> str:
        """Name of a picture, for messages."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What must be equal for two runs to have read the same pictures in the same order."""
        raise NotImplementedError

    def classes(self) -> Classes | None:
        """Labels and names, as far as they are known without reading pictures."""
        return None

    def notes(self) -> list[str]:
        """What was left out of the dataset, one line each."""
        return []

    def load(self, index: int) -> tuple[UInt8[np.ndarray, "s s 3"], int]:
        """Cropped pixels and label.

        Raises:
          UnreadablePicture: the file is absent, damaged or no picture.
        """
        try:
            data, label = self.fetch(index)
            return center_crop(decode(data), self.size), label
        except StoreError:  # which says nothing about the picture
            raise
        except Exception as e:  # Pillow reports damage with many exception types
            reason = " ".join(str(e).split())[:120] or type(e).__name__
            raise UnreadablePicture(f"{self.label_of(index)} ({reason})") from e

    def read(
        self, indices: Int[np.ndarray, " b"], flips: Bool[np.ndarray, " b"]
    ) -> dict[str, np.ndarray]:
        """{"image": uint8 [b, s, s, 3], "label": int32 [b], "unreadable": int64 [b]}.

        In place of an unreadable picture stands the next readable one of the dataset, so that the
        stream remains a function of its position alone; "unreadable" then has the index of the
        picture that was asked for, and else -1.

        Raises:
          InputError: no picture can be read.
        """
        images = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        labels = np.empty(len(indices), np.int32)
        unreadable = np.full(len(indices), -1, np.int64)
        for row, (asked, flip) in enumerate(zip(indices, flips)):
            for offset in range(len(self)):
                try:
                    image, labels[row] = self.load((int(asked) + offset) % len(self))
                    break
                except UnreadablePicture:
                    unreadable[row] = asked
            else:
                raise InputError(f"{self.name}: not one of {len(self)} pictures can be read")
            images[row] = image[:, ::-1] if flip else image
        return {"image": images, "label": labels, "unreadable": unreadable}

    def check_fits(self, shape: tuple[int, int, int], num_classes: int) -> None:
        """The dataset must not have more classes than the model.

        Raises:
          InputError: it has.
        """
        if self.num_classes is not None and self.num_classes > num_classes:
            raise InputError(
                f"{self.name} has labels from 0 to {self.num_classes - 1}, the model has classes "
                f"0 to {num_classes - 1}: set config.model.num_classes"
            )


class Folder(Pictures):
    """One directory per class, or pictures with a `dataset.json`; a folder or a .zip of one.

    Directories are numbered in the sorted order of their names, as ImageFolder does. Pictures lie
    at any depth below; see `image_tree` for what is left out, which `notes` says.

    Raises:
      InputError: see `open_tree` and `labelled`.
    """

    def __init__(self, path: str, size: int):
        self.tree = open_tree(path)
        self.root, self.size, self.name = self.tree.root, size, path
        found = labelled(self.tree)
        self.files, self.labels = list(found.files), found.labels
        self._classes = Classes.of(self.labels, found.names)
        self.num_classes = len(found.names) or int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.files)

    def fetch(self, index: int) -> tuple[bytes, int]:
        return self.tree.read(self.files[index]), int(self.labels[index])

    def label_of(self, index: int) -> str:
        return self.files[index]

    def classes(self) -> Classes:
        return self._classes

    def notes(self) -> list[str]:
        return self.tree.notes()

    def identity(self) -> dict[str, Any]:
        names = hashlib.sha256("\0".join(self.files).encode("utf-8", "surrogateescape"))
        if not self._classes.names:  # labels do not follow from the names
            names.update(self.labels.tobytes())
        return {
            "source": "folder",
            "path": str(place(self.name).absolute()),
            "pictures": len(self),
            "classes": self.num_classes,
            "names_sha256": names.hexdigest(),
        }


class Tfds(Pictures):
    """A split of a prepared TFDS dataset; read without TensorFlow.

    `path` is the folder of one version (with `dataset_info.json`), or a name such as
    `imagenet2012` in TFDS's own data folder (environment variable TFDS_DATA_DIR). Of a folder in an
    object store the split is copied to this machine.

    Args:
      stage: folder for such copies; empty: they go when the process ends.

    Raises:
      InputError: not there, no such split or feature, or in a format without random access.
    """

    def __init__(self, path: str, size: int, split: str, image: str, label: str, stage: str = ""):
        self.size, self.name, self.split = size, f"{path}[{split}]", split
        self.image, self.label = image, label
        builder = _tfds_builder(_tfds_copy(place(path), split, stage) if is_object(path) else path)
        features = builder.info.features
        if missing := [name for name in (image, label) if name not in features]:
            raise InputError(
                f"{path} has no feature {missing[0]!r}: it has {', '.join(sorted(features))}; set "
                "the names of the image and label features"
            )
        self.full_name = builder.info.full_name
        self.num_classes = getattr(features[label], "num_classes", None)
        self._names = tuple(getattr(features[label], "names", None) or ())
        self.source = _tfds_source(builder, split, image, label)

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, index: int) -> tuple[bytes, int]:
        example = self.source[index]
        return example[self.image], int(example[self.label])

    def label_of(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def classes(self) -> Classes:
        return Classes({}, self._names)

    def identity(self) -> dict[str, Any]:
        return {
            "source": "tfds",
            "dataset": self.full_name,
            "split": self.split,
            "features": [self.image, self.label],
            "pictures": len(self),
            "classes": self.num_classes,
        }


def _tfds_copy(path: ObjectPath, split: str, stage: str) -> str:
    """A folder on this machine with the split, and with what is said of all of them."""
    try:
        mirror = Mirror(path, stage)
        if _TFDS_CARD not in mirror.names:
            raise InputError(f"no TFDS dataset {path}: give the folder that has {_TFDS_CARD}")
        splits = re.findall(r"\w+", re.sub(r"\[.*?\]", "", split))  # of train[:10%]+test
        kept = [f"-{name}." for name in splits] or [""]
        files = [n for n in mirror.names if "record-" not in n or any(k in n for k in kept)]
        return str(mirror.fetch(files))
    except OSError as e:
        raise InputError(f"cannot read {path} ({e.strerror})") from e


def _tfds_builder(path: str):
    import tensorflow_datasets as tfds

    try:
        if (Path(path) / _TFDS_CARD).exists():
            return tfds.builder_from_directory(path)
        return tfds.builder(path, file_format="array_record")
    except Exception as e:  # TFDS has its own types for unknown names, versions and folders
        reason = str(e).strip().splitlines()[0][:160] if str(e).strip() else type(e).__name__
        raise InputError(
            f"no TFDS dataset {path} ({reason}): give the folder that has dataset_info.json, or a "
            "name that is prepared in TFDS_DATA_DIR"
        ) from e


def _tfds_source(builder, split: str, image: str, label: str):
    import tensorflow_datasets as tfds

    try:
        source = builder.as_data_source(split, decoders={image: tfds.decode.SkipDecoding()})
        example = source[0]
    except Exception as e:
        reason = str(e).strip().splitlines()[0][:160] if str(e).strip() else type(e).__name__
        raise InputError(
            f"cannot read split {split!r} of {builder.info.full_name} ({reason}): it must be "
            "prepared with file_format='array_record'"
        ) from e
    if not isinstance(example[image], bytes) or not isinstance(example[label], int | np.integer):
        raise InputError(
            f"features {image!r} and {label!r} of {builder.info.full_name} are no encoded picture "
            "and class: set the names of the image and label features"
        )
    return source
