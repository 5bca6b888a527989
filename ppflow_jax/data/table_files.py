"""Which files hold the examples of a split: Parquet shards, and what `datasets` saves.

    DIR/state.json, DIR/data-00000-of-00002.arrow, ...     Dataset.save_to_disk
    DIR/dataset_dict.json, DIR/train/state.json, ...       DatasetDict.save_to_disk
    DIR/data/train-00000-of-00005.parquet, ...             Dataset.push_to_hub
    DIR/train/0000.parquet, DIR/train.parquet              other names of a split
    DIR/part.0.parquet, ...                                no split: all of it is `train`
    FILE.parquet, DIR/train-*.parquet                      a file, or a pattern: no split is chosen

In a folder on this machine, in an object store, or of a dataset `hf:OWNER/REPO` on the hub.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ppflow_jax.data.image_tree import hidden
from ppflow_jax.errors import InputError
from ppflow_jax.files.hub import Dataset, is_hub
from ppflow_jax.files.mirror import Mirror
from ppflow_jax.files.place import ObjectPath, place

PARQUET, DICT, STATE, INFO = ".parquet", "dataset_dict.json", "state.json", "dataset_info.json"
_LEGACY = "dataset_infos.json"  # of a repository, from before the features were in its README
_NUMBERED = re.compile(r"(?P<split>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?:-[0-9a-f]+)?")
_SPLIT = re.compile(r"train|training|val|valid|validation|dev|test|testing|eval", re.I)


@dataclass(frozen=True)
class TableFiles:
    """The shards of a split.

    Attributes:
      name: as the user wrote it, for messages.
      address: the same for every run that reads the same: an absolute path, or a commit.
      files: below the dataset, in the order of the examples.
      paths: of the same on this machine.
      features: of the columns as `datasets` writes them; empty where no file beside them says so.
      others: Parquet files whose names have no split, where those of others have one; not read.
    """

    name: str
    address: str
    files: tuple[str, ...]
    paths: tuple[Path, ...]
    features: dict[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Tree:
    """All files of a dataset, and what brings some of them to this machine, below one folder."""

    name: str
    address: str
    names: tuple[str, ...]
    fetch: Callable[[list[str]], Path]

    def json(self, name: str) -> Any:
        try:
            return json.loads((self.fetch([name]) / name).read_text())
        except (OSError, ValueError) as e:
            raise InputError(f"{self.name}: cannot read {name} ({e}): copy it again") from e

    def chosen(
        self, files: list[str], features: dict[str, Any], others: tuple[str, ...] = ()
    ) -> TableFiles:
        root = self.fetch(files)
        paths = tuple(root / file for file in files)
        return TableFiles(self.name, self.address, tuple(files), paths, features, others)


def find_tables(path: str, split: str, stage: str = "") -> TableFiles:
    """The files of a split of the dataset at `path`.

    Args:
      split: "" is the only one that there is.
      stage: folder where copies of what is in an object store are kept; empty: for this process.

    Raises:
      InputError: nothing there, no such split, shards that are missing.
    """
    root, pattern = _parts(path)
    tree = _open(path, root, stage)
    if pattern:
        files = [n for n in tree.names if _matches(n, pattern)]
        if not files or not all(file.endswith(PARQUET) for file in files):
            raise InputError(f"{path}: no {PARQUET} files of that name")
        return tree.chosen(files, _features(tree))
    if DICT in tree.names:
        split = _one_of(path, split, tree.json(DICT).get("splits", []))
        return _saved(tree, f"{split}/", split)
    if STATE in tree.names:
        return _saved(tree, "", split)
    return tree.chosen(*_shards(tree, split))


def _parts(path: str) -> tuple[str, str]:
    """The folder, and the rest: a file, or what has wildcards; "" of a folder."""
    path, at, revision = path.partition("@") if is_hub(path) else (path, "", "")
    parts = path.split("/")
    first = next((k for k, part in enumerate(parts) if re.search(r"[*?]", part)), len(parts))
    if first == len(parts) and path.endswith(PARQUET):
        first -= 1
    root = "/".join(parts[:first]) or ("/" if path.startswith("/") else ".")
    return f"{root}{at}{revision}", "/".join(parts[first:])


def _matches(name: str, pattern: str) -> bool:
    """As a shell does with * and ?: a wildcard is no slash."""
    parts, patterns = name.split("/"), pattern.replace("[", "[[]").split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _open(path: str, root: str, stage: str) -> _Tree:
    if is_hub(root):
        dataset = Dataset(root)
        return _Tree(path, str(dataset), dataset.names, dataset.fetch)
    where = place(root).absolute()
    address = str(place(path).absolute())
    if isinstance(where, ObjectPath):
        try:
            mirror = Mirror(where, stage)
        except OSError as e:
            raise InputError(f"cannot read {path} ({e.strerror})") from e
        tree = _Tree(path, address, mirror.names, mirror.fetch)
    else:
        tree = _Tree(path, address, _walk(where), lambda files: where)
    if not tree.names:
        raise InputError(
            f"{path}: nothing is there: give a folder of {PARQUET} files, one that "
            "datasets.save_to_disk made, or hf:OWNER/REPO"
        )
    return tree


def _walk(root: Path) -> tuple[str, ...]:
    """Files below a folder that are not hidden, with their paths from there."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not hidden(name)]
        found += [Path(folder, name).relative_to(root).as_posix() for name in files]
    return tuple(sorted(name for name in found if not hidden(PurePosixPath(name).name)))


def _saved(tree: _Tree, below: str, split: str) -> TableFiles:
    """What `save_to_disk` left in the folder `below`."""
    where = f"{tree.name}/{below}".rstrip("/")
    if f"{below}{STATE}" not in tree.names:
        raise InputError(f"{where} has no {STATE}: copy it again, or save it again")
    state = tree.json(f"{below}{STATE}")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise InputError(f"{where} is a selection of other rows: save it by a newer datasets")
    if split and not below and state.get("_split") not in (None, split):
        raise InputError(f"{where} is the split {state['_split']}, not {split}: set split to it")
    files = [f"{below}{entry['filename']}" for entry in state.get("_data_files") or []]
    if absent := [file for file in files if file not in tree.names]:
        raise InputError(f"{where}: {absent[0]} is missing ({len(absent)} such): copy it again")
    if not files:
        raise InputError(f"{where}: no examples")
    info = tree.json(f"{below}{INFO}") if f"{below}{INFO}" in tree.names else {}
    return tree.chosen(files, info.get("features") or {})


def _shards(tree: _Tree, split: str) -> tuple[list[str], dict[str, Any], tuple[str, ...]]:
    """Parquet files of a split, by their names; features; files whose names have no split."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(n for n in tree.names if n.endswith(PARQUET)):
        folder, _, file = name.rpartition("/")
        found[_split_of(name)][folder].append(file)
    if not found:
        some = ", ".join(tree.names[:4])
        raise InputError(
            f"{tree.name} has no {PARQUET} files and no {STATE}: it has {some}; give a folder of "
            "Parquet shards, or one that datasets.save_to_disk made"
        )
    if set(found) == {""}:  # names say nothing
        found["train"] = found.pop("")
    split = _one_of(tree.name, split, sorted(filter(None, found)))
    folders = found[split]
    if len(folders) > 1 and any(map(_split_of, tree.names)):
        some = " and ".join(sorted(folder or "." for folder in folders)[:2])
        raise InputError(f"{tree.name} has the split {split} in {some}: give one of these folders")
    files = [f"{folder}/{file}".lstrip("/") for folder, f in folders.items() for file in f]
    _check_numbers(tree.name, files)
    others = (f"{k}/{file}".lstrip("/") for k, names in found[""].items() for file in names)
    return files, _features(tree), tuple(others)


def _one_of(name: str, split: str, splits: list[str]) -> str:
    """`split`, or the only one.

    Raises:
      InputError: it is not there, or none is asked for and there are several.
    """
    if split in splits or (not split and len(splits) == 1):
        return split or splits[0]
    if not split:
        raise InputError(f"{name} has the splits {', '.join(splits)}: give the files of one")
    raise InputError(f"{name} has no split {split!r}: it has {', '.join(splits)}")


def _split_of(name: str) -> str:
    path = PurePosixPath(name)
    if numbered := _NUMBERED.fullmatch(path.stem):
        return numbered["split"]
    return next((word for word in (path.stem, path.parent.name) if _SPLIT.fullmatch(word)), "")


def _check_numbers(name: str, files: list[str]) -> None:
    """Shards that say how many there are must all be there, once."""
    found = [match for file in files if (match := _NUMBERED.fullmatch(PurePosixPath(file).stem))]
    for count in {int(match["count"]) for match in found}:
        numbers = [int(match["number"]) for match in found if int(match["count"]) == count]
        if sorted(numbers) != list(range(count)):
            raise InputError(
                f"{name} has shards {_said(numbers)} of {count} of the split "
                f"{found[0]['split']}: copy the others, or remove what is twice"
            )
    if len({match["count"] for match in found}) > 1:
        raise InputError(f"{name} has two sets of shards of the split {found[0]['split']}")


def _said(numbers: list[int]) -> str:
    return ", ".join(map(str, sorted(numbers)[:8])) + (", ..." if len(numbers) > 8 else "")


def _features(tree: _Tree) -> dict[str, Any]:
    """Of old repositories, whose Parquet files do not say it themselves; one configuration only."""
    if _LEGACY not in tree.names:
        return {}
    infos = tree.json(_LEGACY)
    features = [info.get("features") or {} for info in infos.values()]
    return features[0] if len(features) == 1 else {}
