"""Parquet shards and folders of `datasets` for the tests, written as datasets 5.2 writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

NAMES = ["ant", "bee", "cat"]
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}


def table(pictures: list[bytes | None], labels: list[Any], features: Any = FEATURES) -> pa.Table:
    """The columns of a dataset with the features `image` and `label`."""
    cells = [{"bytes": data, "path": f"{k}.jpeg"} for k, data in enumerate(pictures)]
    columns = {"image": pa.array(cells, PICTURE), "label": pa.array(labels)}
    said = {"huggingface": json.dumps({"info": {"features": features}})} if features else {}
    return pa.table(columns).replace_schema_metadata(said)


def shards(rows: pa.Table, count: int) -> list[pa.Table]:
    """Parts of nearly equal length, in order."""
    ends = [len(rows) * k // count for k in range(count + 1)]
    return [rows.slice(a, b - a) for a, b in zip(ends, ends[1:])]


def pushed(folder: Path, rows: pa.Table, count: int = 2, split: str = "train", group: int = 3):
    """As `push_to_hub` lays it out: data/train-00000-of-00002.parquet; the folder."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for k, part in enumerate(shards(rows, count)):
        path = folder / "data" / f"{split}-{k:05d}-of-{count:05d}.parquet"
        pq.write_table(part, path, row_group_size=group, write_page_checksum=True)
    (folder / "README.md").write_text("---\nconfigs: []\n---\n")
    return folder


def saved(folder: Path, rows: pa.Table, count: int = 2, split: str | None = "train") -> Path:
    """As `Dataset.save_to_disk` lays it out; the folder."""
    folder.mkdir(parents=True)
    files = [f"data-{k:05d}-of-{count:05d}.arrow" for k in range(count)]
    for file, part in zip(files, shards(rows, count)):
        with pa.OSFile(str(folder / file), "wb") as sink:
            with pa.ipc.new_stream(sink, part.schema) as writer:
                writer.write_table(part, max_chunksize=2)
    state = {"_data_files": [{"filename": file} for file in files], "_split": split}
    (folder / "state.json").write_text(json.dumps(state | {"_fingerprint": "0123456789abcdef"}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    return folder


def saved_splits(folder: Path, **splits: pa.Table) -> Path:
    """As `DatasetDict.save_to_disk` lays it out; the folder."""
    for split, rows in splits.items():
        saved(folder / split, rows, 1, split)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder
