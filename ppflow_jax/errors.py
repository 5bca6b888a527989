"""The exceptions that speak to the person at the keyboard (one line, no traceback, see cli.py), and
checks of values that every command shares."""

from __future__ import annotations

import re

import numpy as np

EXTRAS = {"gs": "gcs", "s3": "s3"}  # object stores, and what pip calls that which reads them
HUB = "hf:"  # what addresses on the Hugging Face hub begin with
SEEDS = 2**32  # the key of a seed takes 32 bits of it
_ON_HUB = re.compile(r"(?:^|[:,=])hf:(?!/)")
_SCHEME = re.compile(r"(?:^|[:,=])([A-Za-z][A-Za-z0-9+.-]+)://")
# With one slash too: what a typing error or a path library leaves of an address
_KNOWN = re.compile(r"(?:^|[:,=])(gs|s3|r2|hf|hdfs|az|abfss?|https?|ftp|file):/")


class InputError(ValueError):
    """Bad configuration, flag or file. The message says what, what was expected, what to do."""


class RunError(RuntimeError):
    """A run that cannot continue, as after a loss that is not finite; it says what is kept."""


class Stopped(RuntimeError):
    """A run that was asked to stop and has saved everything: the same command continues."""


def check_seed(seed: int, name: str) -> None:
    """
    Raises:
      InputError: a seed that no random key can be made of, or that gives the key of another one.
    """
    if not 0 <= seed < SEEDS:
        raise InputError(f"{name}={seed}: a seed is a whole number from 0 to {SEEDS - 1}")


def stream_seed(seed: int, stream: int) -> np.uint32:
    """Seed of one of the random streams of a run."""
    return np.uint32((seed + stream) % SEEDS)


def check_address(text: str, name: str, stores: bool, hub: bool = False) -> None:
    """
    Args:
      stores: whether `name` takes addresses in an object store.
      hub: whether it takes weights or a dataset of the Hugging Face hub.

    Raises:
      InputError: an address that is not supported, which would become a local folder of that name.
    """
    if _ON_HUB.search(text) and not hub:
        raise InputError(
            f"{name}={text}: weights and Parquet datasets are read from the hub, and nothing "
            "else: give a local path"
        )
    if not (found := _SCHEME.search(text) or _KNOWN.search(text)):
        return
    scheme = found[1]
    if stores and scheme in EXTRAS:
        if not re.search(rf"(?:^|[:,=]){scheme}://[^/]{{3,}}", text):
            raise InputError(f"{name}={text}: write {scheme}://BUCKET/NAME")
        return
    if scheme in EXTRAS:
        raise InputError(f"{name}={text}: {scheme}:// is not supported here: give a local path")
    do = "copy the data here, or mount the store"
    if scheme in ("file", "hf"):
        do = "leave it out" if scheme == "file" else "weights are hf:OWNER/REPO[/FILE], no slashes"
    raise InputError(
        f"{name}={text}: {scheme}:// addresses are not supported, only local paths, gs:// and "
        f"s3://: {do}"
    )
