"""Which class every picture of a tree has, and which classes a dataset has examples of."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from ppflow_jax.data.image_tree import CARD, DATASET, EXTENSIONS, ImageTree
from ppflow_jax.errors import InputError

_SHOWN = 10  # classes that are printed one by one
_SPLIT = re.compile(r"(train|training|val|valid|validation|test|testing|dev|eval)[-_ ]?\d*", re.I)


@dataclass(frozen=True)
class Classes:
    """What a dataset says of its labels.

    Attributes:
      counts: examples by label; empty: not known.
      names: of the classes from 0 on; empty: they have none.
    """

    counts: dict[int, int] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, labels: Int[np.ndarray, " n"], names: Iterable[str] = ()) -> Classes:
        found, counts = np.unique(labels, return_counts=True)
        return cls(dict(zip(found.tolist(), counts.tolist())), tuple(names))

    def to_json(self) -> dict[str, Any]:
        return {"counts": {str(k): n for k, n in self.counts.items()}, "names": list(self.names)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Classes:
        return cls({int(k): n for k, n in values["counts"].items()}, tuple(values["names"]))

    def trained(self, num_classes: int) -> Int[np.ndarray, " k"]:
        """Classes that have examples, in order; all where that is not known."""
        return np.int32(sorted(self.counts) if self.counts else range(num_classes))

    def number(self, name: str) -> int | None:
        """The class of this name."""
        return self.names.index(name) if name in self.names else None

    def notes(self, num_classes: int | None = None) -> list[str]:
        """What a person should know before training a model of `num_classes` on it."""
        lines = []
        if self.names:
            lines.append(f"classes: {self._listed(range(len(self.names)))}")
        if any(name.isdigit() and int(name) != k for k, name in enumerate(self.names)):
            k, name = next((k, n) for k, n in enumerate(self.names) if n.isdigit() and int(n) != k)
            lines.append(
                f"classes are numbered in the order of their names: directory {name} is class {k}"
            )
        missing = (num_classes or 0) - len(self.counts)
        if self.counts and missing > 0:
            lines.append(
                f"labels: {len(self.counts)} of the model's {num_classes} classes have examples "
                f"({self._listed(sorted(self.counts))}); {missing} are never trained"
            )
        return lines

    def _listed(self, labels: Iterable[int]) -> str:
        labels = list(labels)
        parts = []
        for k in labels[:_SHOWN]:
            name = f" {self.names[k]}" if k < len(self.names) else ""
            count = f" ({self.counts[k]:,})" if k in self.counts else ""
            parts.append(f"{k}{name}{count}")
        more = len(labels) - _SHOWN
        return ", ".join(parts) + (f" and {more} more" if more > 0 else "")


def describe(source: Any, num_classes: int | None = None) -> list[str]:
    """What a person should know of a data source, one line each; `num_classes` of the model."""
    classes = source.classes()
    return source.notes() + (classes.notes(num_classes) if classes else [])


@dataclass(frozen=True)
class Labelled:
    """Pictures of a tree and their classes; `names` is empty where `dataset.json` has numbers."""

    files: tuple[str, ...]
    labels: Int[np.ndarray, " n"]
    names: tuple[str, ...]


def labelled(tree: ImageTree) -> Labelled:
    """Class of every picture: of `dataset.json` if there is one, else its first directory.

    Directories are numbered in the sorted order of their names, as ImageFolder of the PyTorch
    code does. What has no class is left out and counted in `tree.left_out`.

    Raises:
      InputError: no classes, a directory without pictures, a folder of splits, labels that are
        not whole numbers.
    """
    if CARD in tree.others and "samples.npz" in tree.others:
        raise InputError(
            f"{tree.name} is a folder of samples: give --save_latents to sample, and read its "
            "latents.npy with config.data.source=arrays"
        )
    if DATASET in tree.others:
        return _packed(tree)
    inner = sorted(o for o in tree.others if o.count("/") == 1 and o.endswith(f"/{DATASET}"))
    if inner:
        raise InputError(
            f"{tree.name} has {inner[0]}: give {tree.name}/{inner[0].partition('/')[0]}"
        )
    return _by_directory(tree)


def _by_directory(tree: ImageTree) -> Labelled:
    if not tree.directories:
        raise InputError(f"{tree.name} has no directories: give a folder with one per class")
    files = [file for file in tree.files if "/" in file]
    if loose := len(tree.files) - len(files):
        tree.left_out["pictures outside of the class directories"] += loose
    tops = [file.partition("/")[0] for file in files]
    found = Counter(tops)
    if empty := [name for name in tree.directories if name not in found]:
        raise InputError(
            f"{tree.name}/{empty[0]} has no pictures ({', '.join(EXTENSIONS)}): every directory "
            "counts as a class; remove the empty ones"
        )
    _check_level(tree, files)
    if all(re.fullmatch(r"\d{5}/img\d{8}\.\w+", file) for file in files):
        raise InputError(
            f"{tree.name} was packed by the EDM or StyleGAN tool and has no {DATASET}, which holds "
            "its labels: copy that file too, or pack it again"
        )
    numbers = {name: k for k, name in enumerate(tree.directories)}
    return Labelled(tuple(files), np.int32([numbers[top] for top in tops]), tree.directories)


def _check_level(tree: ImageTree, files: list[str]) -> None:
    """Refuse a folder of splits, and one a level above the classes."""
    direct = {file.partition("/")[0] for file in files if file.count("/") == 1}
    nested = [name for name in tree.directories if name not in direct]
    splits = [name for name in tree.directories if _SPLIT.fullmatch(name)]
    if len(splits) == len(tree.directories):
        wrong = splits
    elif len(nested) == len(tree.directories):
        wrong = nested
    else:
        wrong = [name for name in nested if name in splits]
    if wrong:
        some = ", ".join(wrong[:3])
        raise InputError(
            f"{tree.name} has the directories {some}, which look like splits or folders of "
            f"classes, not like classes: give the folder that has one directory per class, such "
            f"as {tree.name}/{wrong[0]}, with the pictures directly in them"
        )


def _packed(tree: ImageTree) -> Labelled:
    """`{"labels": [[file, class], ...]}`."""
    where = f"{tree.name}: {DATASET}"
    try:
        labels = json.loads(tree.read(DATASET))["labels"]
        pairs = None if labels is None else [(name, label) for name, label in labels]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{where} cannot be read ({type(e).__name__}): expected "
            '{"labels": [["00000/img00000000.png", 0], ...]}'
        ) from e
    if not pairs:
        raise InputError(
            f"{where} has no labels: pack the pictures with labels, or put them into one directory "
            "per class"
        )
    for name, label in pairs:
        if type(name) is not str or type(label) is not int or label < 0:
            raise InputError(
                f"{where} gives {name!r} the label {label!r}: expected a file and a whole number "
                "from 0 on"
            )
    known = {name.replace("\\", "/"): label for name, label in pairs}
    if len(known) != len(pairs):
        raise InputError(f"{where} names a file twice: pack it again")
    there = set(tree.files)
    if absent := [name for name in known if name not in there]:
        raise InputError(
            f"{where} names {absent[0]}, which is no picture there ({len(absent)} such): copy the "
            "missing files, or pack it again"
        )
    files = tuple(file for file in tree.files if file in known)
    if left := len(tree.files) - len(files):
        tree.left_out[f"pictures without a label in {DATASET}"] += left
    return Labelled(files, np.int32([known[file] for file in files]), ())
