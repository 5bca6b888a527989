"""Where the weights are that a checkpoint leaves to another one, its base.

    WORKDIR/base

is that other checkpoint, or a link to it, if it is not where it was when training began.
"""

from __future__ import annotations

from pathlib import Path

from ppflow_jax.checkpoints.card import Base
from ppflow_jax.errors import InputError
from ppflow_jax.files.place import place
from ppflow_jax.files.store import digest, find_checkpoint

NAME = "base"


def named(path: str | Path) -> Base:
    """The checkpoint at `path`, as a card keeps it.

    Raises:
      InputError: no checkpoint.
    """
    folder = find_checkpoint(path)
    return Base(str(folder), digest(folder))


def find_base(base: Base, workdir: Path) -> Path:
    """The folder of `base`, whose content is what it was; `workdir` is of the run that needs it.

    Raises:
      InputError: it is not there, or has changed.
    """
    moved = workdir / NAME
    path = moved if moved.exists() else place(base.path)
    here = f"put the weights that it was trained from, or a link to them, at {moved}"
    if not path.exists():
        raise InputError(f"{workdir} has only what it trained, and its base {path} is gone: {here}")
    folder = find_checkpoint(path)
    if (found := digest(folder)) != base.sha256:
        raise InputError(
            f"{folder} is not the base of {workdir} any more (SHA-256 {found[:12]}, not "
            f"{base.sha256[:12]}): {here}"
        )
    return folder


def workdir_of(folder: Path) -> Path:
    """The workdir of the checkpoint of a step."""
    return folder.parents[1]
