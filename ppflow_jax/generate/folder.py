"""A folder of samples; a command that was killed continues from its finished shards.

    DIR/card.json                          what makes the images; at the end also how it went
    DIR/shards/000000.npy                  pictures 0 to SHARD - 1, uint8 NHWC, and so on
    DIR/shards/000000.latents.npy          if asked, their latents
    DIR/samples.npz, grid.png, ...         at the end, then the shards go

Image k lies in shard k // SHARD. Processes meet in this folder, which all of them see, and nowhere
else.
"""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from ppflow_jax.console import progress
from ppflow_jax.data.save import save_grid, save_png
from ppflow_jax.errors import InputError
from ppflow_jax.files.arrays import load_array, rows_of
from ppflow_jax.files.copies import local_file
from ppflow_jax.files.disk import atomic, remove_tree, writable_directory
from ppflow_jax.files.objects import StoreError
from ppflow_jax.files.place import ObjectPath, place
from ppflow_jax.files.shards import Shards

SHARD = 256
GRID = 100  # pictures in grid.png
CARD = "card.json"


class SampleFolder:
    """The folder of images, which may grow: more of the same settings are added to those there.

    Attributes:
      settings: everything the images depend on, as JSON values.
      shards: of its images.
      complete: all is done; there is nothing to do.
      grows: fewer images of the same settings are there.

    Raises:
      InputError: images of other settings are there.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]):
        self.path = place(path).absolute()
        self.settings = json.loads(json.dumps(settings))  # tuples become lists, as on disk
        self.with_latents = settings["save_latents"]
        self.shards = Shards(self.path / "shards", settings["num"], SHARD, self._whole)
        self._seen: set[int] = set()  # shards that are whole, in an object store
        self.grows = False
        self.complete = self._check()

    def _check(self) -> bool:
        found = begun(self.path)
        if found is None:
            return False
        settings, complete = found
        changed = [
            k
            for k in dict.fromkeys([*settings, *self.settings])
            if settings.get(k) != self.settings.get(k)
        ]
        self.grows = {"num"} <= {*changed} <= {"num", "pngs"} and (
            settings["num"] < self.settings["num"]
        )
        if changed and not self.grows:
            said = [f"{k}: {settings.get(k)} -> {self.settings.get(k)}" for k in changed]
            raise InputError(
                f"{self.path} holds {'' if complete else 'part of '}{settings.get('num')} images "
                f"of other settings ({', '.join(said)}): choose another --out, remove that "
                "folder, or give its settings"
            )
        return complete and not self.grows

    def start(self, first: bool) -> None:
        """Make the folder; the `first` process writes the card, the others wait for it.

        Raises:
          InputError: it cannot be written; images of other settings are there.
        """
        writable_directory(self.shards.folder)
        if first and (self.grows or not (self.path / CARD).exists()):
            if self.grows:
                self._unpack()
            self._write_card(complete=False)
        wait_for(lambda: self._check() or ((self.path / CARD).exists() and not self.grows))

    def _unpack(self) -> None:
        """Shards of what is there, which had fewer images; the last one is made again."""
        kinds = {"": "samples.npz", ".latents": "latents.npy"}
        if not self.with_latents:
            del kinds[".latents"]
        if not all((self.path / name).exists() for name in kinds.values()):
            return
        for kind, name in reversed(kinds.items()):
            if kind == "":
                array = np.load(local_file(self.path / name))["arr_0"]
            else:
                array = load_array(self.path / name)
            with self.shards.room():
                for shard in range(len(array) // SHARD):
                    _save(self._file(shard, kind), array[shard * SHARD : (shard + 1) * SHARD])

    def claim(self, process: int, processes: int) -> list[int]:
        """Shards that this process has to make; a damaged one of them is removed."""
        shards = self.shards.left(process, processes)
        for shard in shards:
            self._file(shard).unlink(missing_ok=True)
        return shards

    def write(
        self,
        shard: int,
        pictures: UInt8[np.ndarray, "b y x k"],
        latents: Float[np.ndarray, "b h w c"],
    ) -> None:
        """Write a shard; it is there when its pictures are.

        Raises:
          RunError: the disk is full.
        """
        with self.shards.room():
            if self.with_latents:
                _save(self._file(shard, ".latents"), latents)
            _save(self._file(shard), pictures)

    def finish(self, labels: Int[np.ndarray, " n"], pngs: bool, results: dict[str, Any]) -> None:
        """From all shards to the files that stay; one shard at a time is in memory.

        `samples.npz` is that of ADM: `arr_0` the pictures, `arr_1` their labels as int64.
        `results` is what the card says besides the settings.

        Raises:
          RunError: the disk is full.
        """
        with self.shards.room():
            with atomic(self.path / "samples.npz") as temporary:
                with zipfile.ZipFile(temporary, "w") as archive:
                    for name, arrays in (
                        ("arr_0", self._arrays()),
                        ("arr_1", iter([labels.astype(np.int64)])),
                    ):
                        entry = zipfile.ZipInfo(f"{name}.npy")  # of no date: equal files
                        with archive.open(entry, "w", force_zip64=True) as file:
                            _join(file, arrays, self.shards.count)
            if self.with_latents:
                with atomic(self.path / "latents.npy") as temporary, temporary.open("wb") as file:
                    _join(file, self._arrays(".latents"), self.shards.count)
                _save(self.path / "labels.npy", labels)
            if pngs:
                self._write_pngs(labels)
            shown = load_array(self._file(0))[:GRID]
            save_grid(self.path / "grid.png", shown, columns=min(10, len(shown)))
            self._write_card(complete=True, **results)
        self.tidy()

    def tidy(self) -> None:
        """Remove the shards of a complete folder."""
        remove_tree(self.shards.folder)

    def wait_until_complete(self) -> None:
        """Until another process has finished the folder."""
        wait_for(lambda: self._check())

    def _write_card(self, complete: bool, **results: Any) -> None:
        values = {"complete": complete, "settings": self.settings, **results}
        with atomic(self.path / CARD) as temporary:
            temporary.write_text(json.dumps(values, indent=1) + "\n")

    def _write_pngs(self, labels: np.ndarray) -> None:
        folder = self.path / "images"
        folder.mkdir(exist_ok=True)
        with progress(self.shards.count, 0, "png", "images") as bar:
            for k, picture in enumerate(p for pictures in self._arrays() for p in pictures):
                save_png(folder / f"{k:06d}_class{labels[k]}.png", picture)
                bar.update()

    def _file(self, shard: int, kind: str = "") -> Path:
        return self.shards.folder / f"{shard:06d}{kind}.npy"

    def _arrays(self, kind: str = "") -> Iterator[np.ndarray]:
        for shard in range(len(self.shards)):
            yield load_array(self._file(shard, kind))

    def _whole(self, shard: int) -> bool:
        kinds = ["", ".latents"] if self.with_latents else [""]
        if shard in self._seen:
            return True
        try:
            found = [rows_of(self._file(shard, kind)) for kind in kinds]
        except StoreError:
            raise
        except (OSError, ValueError, EOFError):
            return False
        whole = all(rows == len(self.shards.records(shard)) for rows in found)
        if whole and isinstance(self.path, ObjectPath):  # where asking takes long
            self._seen.add(shard)
        return whole


def begun(path: Path) -> tuple[dict[str, Any], bool] | None:
    """Settings of the images in a folder, and whether it is complete; None without any.

    Raises:
      InputError: its card cannot be read.
    """
    try:
        card = json.loads((path / CARD).read_text())
        return dict(card["settings"]), bool(card["complete"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path / CARD} cannot be read ({e!r}): choose another --out") from e


def wait_for(what: Callable[[], bool], seconds: float = 0.5) -> None:
    """Look again and again until `what()`; a peer that died is jax's to notice."""
    while not what():
        time.sleep(seconds)


def _save(path: Path, array: np.ndarray) -> None:
    # Not np.save, which does not see that the last bytes did not fit on the disk.
    with atomic(path) as temporary, temporary.open("wb") as file:
        _join(file, iter([array]), len(array))


def _join(file: BufferedIOBase, arrays: Iterator[np.ndarray], count: int) -> None:
    """One .npy of `count` rows from arrays along the first axis, written one after the other."""
    first = next(arrays)
    header = np.lib.format.header_data_from_array_1_0(first)
    np.lib.format.write_array_header_1_0(file, header | {"shape": (count, *first.shape[1:])})
    for array in (first, *arrays):
        file.write(np.ascontiguousarray(array).data)
