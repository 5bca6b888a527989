"""CPU time of reading a picture from Parquet, Arrow and a folder, in order and shuffled.

    python -m benchmarks.parquet_reading --out=DIR

Makes 4,000 JPEGs of 500x375 pixels in DIR, about as large as those of ImageNet: as a folder, as
Parquet with row groups of 100 and of 1,000 pictures, and as `datasets` saves them. Their bytes are
read from memory, in which the system has the files; decoding is measured apart.
"""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags
from PIL import Image

from ppflow_jax import cli
from ppflow_jax.console import table
from ppflow_jax.data.sources import open_source

_OUT = flags.DEFINE_string("out", None, "New folder, of 2 GB.")
COUNT, DISTINCT = 4000, 40
IN_ORDER, SHUFFLED = 1000, 100  # pictures that are read
PARTS = {
    "a folder": "folder",
    "what save_to_disk left": "arrow",
    "Parquet, row groups of 100": "100",
    "Parquet, row groups of 1,000": "1000",
}


def main() -> None:
    out = Path(_OUT.value)
    if not out.exists():
        make(out)
    order = np.random.default_rng(1).permutation(COUNT)[:SHUFFLED].tolist()
    rows = [("pictures in", "in order, ms", "shuffled, ms")]
    for name, part in PARTS.items():
        source = open_source("folder" if part == "folder" else "parquet", str(out / part), size=256)
        spent = [per_picture(source.fetch, index) for index in (range(IN_ORDER), order)]
        rows.append((name, *(f"{ms:.2f}" for ms in spent)))
        if part == "folder":
            decoding = per_picture(source.load, order)
    print(table(rows))
    print(f"decoding and cropping a picture to 256x256: {decoding:.2f} ms")


def per_picture(read, index) -> float:
    """Milliseconds of CPU."""
    start = time.process_time()
    for k in index:
        read(k)
    return 1e3 * (time.process_time() - start) / len(index)


def make(out: Path) -> None:
    pictures = [jpeg(seed) for seed in range(DISTINCT)]
    print(f"{sum(map(len, pictures)) / DISTINCT:,.0f} bytes a picture")
    cells = [{"bytes": pictures[k % DISTINCT], "path": None} for k in range(COUNT)]
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.table({"image": pa.array(cells, picture), "label": [k % 10 for k in range(COUNT)]})
    for group in (100, 1000):
        (out / str(group)).mkdir(parents=True)
        pq.write_table(rows, out / str(group) / "train.parquet", row_group_size=group)
    (out / "arrow").mkdir()
    with pa.OSFile(str(out / "arrow" / "data.arrow"), "wb") as sink:
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=1000)
    state = {"_data_files": [{"filename": "data.arrow"}]}
    (out / "arrow" / "state.json").write_text(json.dumps(state))
    for k in range(COUNT):
        folder = out / "folder" / f"class{k % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k}.jpeg").write_bytes(pictures[k % DISTINCT])


def jpeg(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (94, 125, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((500, 375)).save(file, "jpeg", quality=95)
    return file.getvalue()


if __name__ == "__main__":
    cli.run(main, required=("out",))
