"""Folders of ArrayRecord files with a manifest, as `prepare` writes them.

    DIR/manifest.json
    DIR/shard-00000-of-00010.array_record, ...

A record ends with the int32 label. With both flips, picture i is record 2i, its mirror image
2i+1. The manifest appears when everything else is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from ppflow_jax.data.ranged import RangedRecords
from ppflow_jax.errors import InputError
from ppflow_jax.files.copies import borrowed
from ppflow_jax.files.disk import atomic, check_room, writable_directory
from ppflow_jax.files.place import ObjectPath

FORMAT = 1
MANIFEST = "manifest.json"
WRITER_OPTIONS = "group_size:1,uncompressed"  # random access; latents do not compress

Kind = TypeVar("Kind", bound="Records")


@dataclass(frozen=True)
class Shard:
    """One ArrayRecord file as it was written; `labels` are the least and the greatest."""

    name: str
    bytes: int
    sha256: str
    records: int
    labels: tuple[int, int] | None
    unreadable: tuple[str, ...]

    def problem(self, folder: Path) -> str | None:
        """Why the file cannot be the one that was written, as far as its size tells."""
        try:
            size = (folder / self.name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return "is missing"
        return None if size == self.bytes else f"has {size} bytes, not the {self.bytes} written"

    def damage(self, folder: Path) -> str | None:
        """The same, by reading all of it."""
        with borrowed(folder / self.name) as path:
            if sha256(path) != self.sha256:
                return "has other contents than were written (SHA-256)"
            records = count_records(path)
        return None if records == self.records else f"has {records} records, not {self.records}"


@dataclass(frozen=True)
class Records:
    """What such a folder holds; manifests derive from it.

    Attributes:
      dataset: identity of the pictures.
      size: side of the ADM centre crop, pixels.
      flips: `both` or `one`.
      shape: of what is stored for a picture.
      batch, shard_pictures: pictures encoded at once on a device, and per file.
      shards: in the order of the dataset.
    """

    what: ClassVar[str]
    remedy: ClassVar[str]
    loose: ClassVar[tuple[str, ...]] = ()  # entries that the records do not depend on

    dataset: dict[str, Any]
    size: int
    flips: str
    shape: tuple[int, int, int]
    batch: int
    shard_pictures: int
    shards: tuple[Shard, ...]

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards)

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        raise NotImplementedError

    @property
    def views(self) -> int:
        """Records of a picture."""
        return 2 if self.flips == "both" else 1

    @property
    def pictures(self) -> int:
        return self.records // self.views

    @property
    def unreadable(self) -> list[str]:
        return [name for shard in self.shards for name in shard.unreadable]

    def digest(self) -> str:
        """Of the contents of all files."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        counts = {
            "pictures": self.pictures,
            "records": self.records,
            "unreadable": len(self.unreadable),
        }
        values = {"format": FORMAT, "crop": "adm-center", "counts": counts} | asdict(self)
        with atomic(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(values, indent=1) + "\n")

    @classmethod
    def read(cls: type[Kind], folder: Path) -> Kind:
        """
        Raises:
          InputError: there is none, or not one of this format.
        """
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError as e:
            raise InputError(
                f"{folder} has no {MANIFEST}: it is no {cls.what}, or not complete; make it "
                f"with {cls.remedy}, and run that again if it was stopped"
            ) from e
        except (OSError, ValueError) as e:
            raise InputError(f"cannot read {path} ({e}): make the {cls.what} again") from e
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise InputError(f"{path} is not of format {FORMAT}: make the {cls.what} again")
        try:
            shards = tuple(read_shard(v) for v in values["shards"])
            values = values | {"shards": shards, "shape": tuple(values["shape"])}
            absent = {name: None for name in cls.loose if name not in values}
            names = cls.__dataclass_fields__
            return cls(**{name: v for name, v in (values | absent).items() if name in names})
        except (KeyError, TypeError) as e:
            raise InputError(f"{path} is damaged ({e}): make the {cls.what} again") from e

    def settings(self) -> dict[str, Any]:
        """What the records depend on, as JSON gives it back."""
        values = asdict(self)
        for name in ("shards", *self.loose):
            del values[name]
        return json.loads(json.dumps(values))

    def check_files(self, folder: Path, checksums: bool = False) -> None:
        """Every shard must be there with its size and, if asked, its hash and number of records.

        Raises:
          InputError: the first that is not.
        """
        for shard in self.shards:
            if problem := shard.problem(folder) or (checksums and shard.damage(folder)):
                raise InputError(
                    f"{folder / shard.name} {problem}: remove that file and run the same "
                    "ppflow_jax.prepare again, which makes what is missing; or copy it again"
                )

    def reader(self, folder: Path, stage: str = "") -> Any:
        """The files as one sequence of bytes.

        Args:
          stage: local folder for copies of what is in an object store; empty: read by ranges.

        Raises:
          InputError: files that are not those of the manifest.
        """
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.check_files(folder)
        if isinstance(folder, ObjectPath) and not stage:
            shards = [(folder / shard.name, shard.records) for shard in self.shards]
            return RangedRecords(shards, self.record_bytes)
        if isinstance(folder, ObjectPath):
            folder = self._staged(folder, Path(stage).absolute())
        records = ArrayRecordDataSource([str(folder / s.name) for s in self.shards])
        if len(records) != self.records:
            raise InputError(
                f"{folder} has {len(records)} records, its manifest says {self.records}: check it "
                "with python -m ppflow_jax.prepare --verify"
            )
        return records

    def _staged(self, folder: ObjectPath, stage: Path) -> Path:
        """Copies of all files, kept for later runs; each is compared when it is made."""
        target = writable_directory(stage / self.digest()[:16])
        missing = [shard for shard in self.shards if shard.problem(target)]
        check_room(target, sum(shard.bytes for shard in missing), f"copies of {folder}")
        for shard in missing:
            with atomic(target / shard.name) as temporary:
                (folder / shard.name).download(temporary, shard.sha256)
        return target


def read_shard(values: dict[str, Any]) -> Shard:
    """From JSON, where tuples are lists; what else is said of an unfinished shard is left out."""
    kept = {k: v for k, v in values.items() if k in Shard.__dataclass_fields__}
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}
    return Shard(**lists)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def count_records(path: Path) -> int:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    count = reader.num_records()
    reader.close()
    return count


def label_counts(path: Path) -> dict[int, int]:
    """Records by label of one file, by reading it: every record ends with its label."""
    from array_record.python.array_record_module import ArrayRecordReader

    with borrowed(path) as file:
        reader = ArrayRecordReader(str(file))
        counts = Counter(int(np.frombuffer(r[-4:], "<i4")[0]) for r in reader.read_all())
        reader.close()
    return dict(counts)
