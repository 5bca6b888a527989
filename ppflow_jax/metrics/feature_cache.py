"""Features kept beside the pictures they are of: computed once, and continued after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ppflow_jax.console import say
from ppflow_jax.data.images import ImageSet
from ppflow_jax.files.disk import atomic
from ppflow_jax.metrics.moments import Moments
from ppflow_jax.metrics.networks import FeatureNetwork

SECONDS = 60  # between two writes of what is there so far


class Partial(NamedTuple):
    """What is known of the first `done` pictures: sums, and the parts of single features."""

    done: int
    sums: dict[str, Moments]
    parts: dict[str, list[np.ndarray]]


@dataclass(frozen=True)
class FeatureCache:
    """One npz file, NAME.features-KEY.npz beside the pictures.

    The key is of everything that the features depend on: names, sizes and times of the picture
    files, their crop, the network, the library and the device. Change one, and they are computed
    again, into another file.
    """

    path: Path
    card: str

    @classmethod
    def beside(
        cls,
        images: ImageSet,
        network: FeatureNetwork,
        moments: tuple[str, ...],
        keep: tuple[str, ...],
    ) -> FeatureCache | None:
        """The file for these pictures; None for pictures that come from no file."""
        if not images.files:
            return None
        card = {
            "pictures": _stamp(images.files),
            "shape": images.shape,
            "network": network.card,
            "moments": moments,
            "features": keep,
            "jax": jax.__version__,
            "device": jax.local_devices()[0].device_kind,
        }
        text = json.dumps(card, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        place = Path(os.path.abspath(images.name))
        return cls(place.with_name(f"{place.name}.features-{key}.npz"), text)

    def load(self) -> Partial | None:
        """What is there; None without the file. A damaged one is said and counts as none."""
        if not self.path.exists():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as file:
                arrays = dict(file)
            card: dict[str, Any] = json.loads(self.card)
            sums = {
                name: Moments.of(int(arrays["done"]), *(arrays[f"{name}.{k}"] for k in range(3)))
                for name in card["moments"]
            }
            parts = {name: [arrays[f"{name}.single"]] for name in card["features"]}
            return Partial(int(arrays["done"]), sums, parts)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
            say(f"{self.path} is damaged ({e}): its features are computed again")
            return None

    def save(self, found: Partial) -> bool:
        """Write it, if that is possible; pictures may lie where nobody can write."""
        arrays = {"card": np.array(self.card), "done": np.array(found.done)}
        for name, moments in found.sums.items():
            arrays |= {f"{name}.{k}": array for k, array in enumerate(moments.sums)}
        for name, parts in found.parts.items():
            arrays[f"{name}.single"] = np.concatenate(parts)
        try:
            with atomic(self.path) as temporary, temporary.open("wb") as file:
                np.savez(file, **arrays)
        except OSError as e:
            say(f"cannot keep features in {self.path} ({e.strerror or e})")
            return False
        return True

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class Autosave:
    """Writes what is found every `SECONDS`, and at the end."""

    def __init__(self, cache: FeatureCache | None):
        self.cache, self._last = cache, time.monotonic()

    def note(self, found: Partial, last: bool) -> None:
        if self.cache and (last or time.monotonic() - self._last > SECONDS):
            if not self.cache.save(found):
                self.cache = None
            self._last = time.monotonic()


def _stamp(files: tuple[Path, ...]) -> str:
    """Digest of names, sizes and times; a file that was written anew has another change time."""
    digest = hashlib.sha256()
    for file in files:
        found = file.stat()
        digest.update(f"{file}\0{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}\n".encode())
    return digest.hexdigest()
