"""Pictures in Parquet files and in datasets of Hugging Face, by number (see tables.py).

grain's own ParquetIterDataset reads on and on; a stream that can begin at any step asks for any
example.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ppflow_jax.data.classes import Classes
from ppflow_jax.data.pictures import Pictures
from ppflow_jax.data.table_files import PARQUET, find_tables
from ppflow_jax.data.tables import ArrowFile, ParquetFile, RowGroups
from ppflow_jax.errors import InputError

LARGE = 2**26  # bytes of a row group that are worth a word
_THREADS = 8


class Parquet(Pictures):
    """A split of Parquet shards, or of what `datasets` saved: see table_files.py.

    The column `image` has encoded pictures, as bytes or in the struct {bytes, path} of `datasets`,
    the column `label` whole numbers. Names of classes are those of its ClassLabel, if it is one.

    Args:
      label: "" where labels are not asked for: they are 0.
      stage: folder for copies of what is in an object store.

    Raises:
      InputError: see `find_tables`; files that cannot be read or differ in their columns, columns
        that are absent or hold something else, no examples.
    """

    def __init__(self, path: str, size: int, split: str, image: str, label: str, stage: str = ""):
        found = find_tables(path, split, stage)
        self.size, self.name, self.split = size, path, split
        self.image, self.label = image, label
        self.address, self.files, self._others = found.address, found.files, found.others
        groups, pairs = RowGroups(), list(zip(found.paths, found.files))
        with ThreadPoolExecutor(_THREADS) as pool:
            openings = [pool.submit(self._open, *pair, groups) for pair in pairs]
            self._tables = [opening.result() for opening in openings]
            self._check_alike()
            parts = list(pool.map(self._labels, self._tables, found.files))
        self.labels: Int[np.ndarray, " n"] = np.concatenate(parts)
        self._first = np.cumsum([0, *map(len, self._tables)])
        self._names = tuple(_names(self._tables[0].schema, found.features, label))
        if not len(self):
            raise InputError(f"{path}: no examples")
        self.num_classes = len(self._names) or int(self.labels.max()) + 1
        if self.labels.max() >= self.num_classes:
            index = int(self.labels.argmax())
            raise InputError(
                f"{self.label_of(index)} has the label {self.labels[index]}, its ClassLabel has "
                f"{self.num_classes} names: mend the dataset"
            )

    def __len__(self) -> int:
        return int(self._first[-1])

    def fetch(self, index: int) -> tuple[bytes, int]:
        table, row = self._place(index)
        found = self._tables[table].cell(self.image, row)
        if isinstance(found, dict):
            if found["bytes"] is None and found.get("path"):
                raise ValueError(f"no picture in it, only the path {found['path']}")
            found = found["bytes"]
        if found is None:
            raise ValueError("no picture in it")
        return found, int(self.labels[index])

    def label_of(self, index: int) -> str:
        table, row = self._place(index)
        return f"{self.files[table]}[{row}]"

    def classes(self) -> Classes:
        return Classes.of(self.labels, self._names)

    def notes(self) -> list[str]:
        found = []
        if self._others:
            some = ", ".join(self._others[:4]) + (", ..." if len(self._others) > 4 else "")
            found.append(f"{self.name}: not read, as their names have no split: {some}")
        size, rows = max(table.largest() for table in self._tables)
        if size >= LARGE:
            found.append(
                f"{self.name}: row groups of {rows:,} pictures, {size / 2**20:,.0f} MiB; training "
                "reads one for nearly every picture, python -m ppflow_jax.prepare every one once"
            )
        return found

    def identity(self) -> dict[str, Any]:
        rows = hashlib.sha256()
        for file, table in zip(self.files, self._tables):
            rows.update(f"{file}\0{len(table)}\0".encode())
        rows.update(self.labels.tobytes())
        return {
            "source": "parquet",
            "path": self.address,
            "split": self.split,
            "columns": [self.image, self.label],
            "pictures": len(self),
            "classes": self.num_classes,
            "rows_sha256": rows.hexdigest(),
        }

    def _place(self, index: int) -> tuple[int, int]:
        table = int(np.searchsorted(self._first, index, "right")) - 1
        return table, index - int(self._first[table])

    def _open(self, path: Path, file: str, groups: RowGroups) -> ParquetFile | ArrowFile:
        import pyarrow as pa

        try:
            table = ParquetFile(path, groups) if file.endswith(PARQUET) else ArrowFile(path)
        except (OSError, pa.ArrowException) as e:
            raise InputError(f"{self.name}: cannot read {file} ({_said(e)}): copy it again") from e
        for name in filter(None, (self.image, self.label)):
            if name not in table.schema.names:
                raise InputError(
                    f"{self.name}: {file} has no column {name!r}: it has "
                    f"{', '.join(table.schema.names)}; set the names of the image and label "
                    "features"
                )
        self._check_types(table.schema, file)
        return table

    def _check_types(self, schema: Any, file: str) -> None:
        image = schema.field(self.image).type
        if not _is_bytes(image):
            raise InputError(
                f"{self.name}: column {self.image!r} of {file} is {image}, not encoded pictures as "
                "bytes or as the struct {bytes, path}: set the name of the image feature"
            )
        if self.label and not str(schema.field(self.label).type).startswith(("int", "uint")):
            raise InputError(
                f"{self.name}: column {self.label!r} of {file} is "
                f"{schema.field(self.label).type}, not whole numbers or a ClassLabel: number the "
                "classes from 0 on, or set the name of the label feature"
            )

    def _check_alike(self) -> None:
        """All files have the two columns as the first has them."""
        names = [name for name in (self.image, self.label) if name]
        first = self._tables[0].schema
        for file, table in zip(self.files, self._tables):
            theirs = _names(table.schema, {}, self.label)
            if theirs != _names(first, {}, self.label):
                raise InputError(f"{self.name}: {file} names other classes than {self.files[0]}")
            for name in names:
                a, b = (schema.field(name).type for schema in (first, table.schema))
                if a != b:
                    raise InputError(
                        f"{self.name}: column {name!r} is {a} in {self.files[0]} and {b} in "
                        f"{file}: give files of one dataset"
                    )

    def _labels(self, table: ParquetFile | ArrowFile, file: str) -> Int[np.ndarray, " n"]:
        import pyarrow as pa

        if not self.label:
            return np.zeros(len(table), np.int32)
        try:
            column = table.column(self.label)
        except (OSError, pa.ArrowException) as e:
            raise InputError(f"{self.name}: cannot read {file} ({_said(e)}): copy it again") from e
        if column.null_count:
            row = column.is_null().to_numpy().argmax()
            raise InputError(
                f"{self.name}: {file}[{row}] has no label ({column.null_count:,} such in it): give "
                "a split that has labels, or leave these out"
            )
        labels = column.to_numpy()
        if len(labels) and not 0 <= labels.min() <= labels.max() < 2**31:
            row = int(np.argmax((labels < 0) | (labels >= 2**31)))
            raise InputError(
                f"{self.name}: {file}[{row}] has the label {labels[row]}: classes are numbered "
                "from 0 on; give a split that has labels"
            )
        return labels.astype(np.int32)


def _is_bytes(kind: Any) -> bool:
    """Whether a type of pyarrow can hold encoded pictures."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(test(kind) for test in tests)


def _names(schema: Any, beside: dict[str, Any], label: str) -> list[str]:
    """Names of the classes: of the schema's metadata, else of the file beside; [] if none has."""
    said = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(said)["info"]["features"] if said else beside
        return list((features.get(label) or {}).get("names") or [])
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # somebody else's metadata


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
