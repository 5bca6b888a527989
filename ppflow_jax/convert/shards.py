"""Weights in several files: an index that says which file has which tensor, and folders."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppflow_jax.convert.tensors import shown
from ppflow_jax.convert.torch_file import one_line_errors, open_regular
from ppflow_jax.errors import InputError
from ppflow_jax.files.copies import given
from ppflow_jax.files.place import ObjectPath
from ppflow_jax.files.place import place as place_of
from ppflow_jax.files.scratch import scratch

INDEX = ".index.json"
CONFIG = "config.json"  # of an AutoencoderKL, beside its weights
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth")  # in the order of preference
_LONGEST_INDEX = 64 * 2**20


def find_weights(folder: str | os.PathLike[str]) -> Path | None:
    """The index or the only file of weights in a folder; None if it has none.

    Raises:
      InputError: several, of which none is an index.
    """
    files = sorted(path for path in place_of(folder).iterdir() if path.is_file())
    for ending in (*(e + INDEX for e in _ENDINGS), *_ENDINGS):
        found = [path for path in files if path.name.endswith(ending)]
        if len(found) > 1:
            names = ", ".join(shown(path.name) for path in found)
            raise InputError(f"{folder} has several files of weights: give one of {names}")
        if found:
            return found[0]
    return None


def on_disk(path: Path) -> Path:
    """A file of weights on this machine, with a config.json that lies beside it in an object store;
    of an index there the files it lists too.

    Raises:
      InputError: it cannot be read.
    """
    if not isinstance(path, ObjectPath):
        return path
    folder, names = scratch(), [path.name]
    try:
        if path.name.endswith(INDEX):
            names += dict.fromkeys(_weight_map(given(str(path))).values())
        if path.with_name(CONFIG).is_file():
            names.append(CONFIG)
        for name in names:
            path.with_name(name).download(folder / name)
    except OSError as e:
        raise InputError(f"cannot read {e.filename} ({e.strerror}), of {path}") from e
    return folder / path.name


def read_shards(
    path: str | os.PathLike[str], read: Callable[[Path], list[tuple[str, Any]]]
) -> dict[str, Any]:
    """All tensors that an index lists, in its order.

    Args:
      path: `*.safetensors.index.json` or `*.bin.index.json`.
      read: gives the names and tensors of one file.

    Raises:
      InputError: the index is none, a file is missing, or the files and the index do not agree.
    """
    path = Path(path)
    listed = _weight_map(path)
    shards = {name: path.with_name(name) for name in dict.fromkeys(listed.values())}
    missing = [name for name, file in shards.items() if not file.is_file()]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(shards)} files are missing, the first is "
            f"{shown(missing[0])}: put all of them beside the index"
        )
    tensors: dict[str, Any] = {}
    owner: dict[str, str] = {}
    for shard, file in shards.items():
        for name, tensor in read(file):
            if name in owner:
                raise InputError(
                    f"{path}: {shown(name)} is in {shown(owner[name])} and in {shown(shard)}; "
                    "expected every tensor in one file: download them again"
                )
            owner[name], tensors[name] = shard, tensor
    for name, shard in listed.items():
        if owner.get(name) != shard:
            raise InputError(
                f"{path}: {shown(name)} is not in {shown(shard)}, where the index says it is; "
                "the files do not belong together: download them again"
            )
    if extra := [name for name in owner if name not in listed]:
        raise InputError(
            f"{path}: {shown(extra[0])} is in {shown(owner[extra[0]])}, but not in the index; "
            "the files do not belong together: download them again"
        )
    return {name: tensors[name] for name in listed}


def _weight_map(path: Path) -> dict[str, str]:
    """Name of each tensor -> name of its file, which lies beside the index."""
    with one_line_errors(path):
        with open_regular(path) as file:
            text = file.read(_LONGEST_INDEX + 1)
        if len(text) > _LONGEST_INDEX:
            raise InputError(f"has more than {_LONGEST_INDEX} bytes; no index has")
        try:
            index = json.loads(text, object_pairs_hook=_unique)
        except ValueError as error:
            raise InputError(f"is no index of weights ({shown(error)})") from error
        listed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(listed, dict) or not listed:
            raise InputError("is no index of weights: expected a weight_map of names and files")
        for name, shard in listed.items():
            if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\\0"):
                raise InputError(f"{shown(name)} is in {shown(shard)}; expected a file beside it")
        return listed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = {}
    for key, value in pairs:
        if made.setdefault(key, value) != value:
            raise InputError(
                f"{shown(key)} is listed twice, in {shown(made[key])} and {shown(value)}"
            )
    return made
