"""The training stream: a pure function of (seed, step, rows of the batch)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from ppflow_jax.data.sources import ArraySource


class _Rows:
    """Some rows of every batch of an endless stream, one after another, from `first_step` on."""

    def __init__(
        self,
        stream: grain.MapDataset,
        batch_size: int,
        first_step: int,
        rows: Int[np.ndarray, " b"],
    ):
        self.stream, self.batch_size, self.first_step = stream, batch_size, first_step
        self.rows = rows

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size

    def __getitem__(self, index: int) -> Any:
        step, k = divmod(int(index), len(self.rows))
        return self.stream[(self.first_step + step) * self.batch_size + int(self.rows[k])]


def batches(
    source: ArraySource,
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    rows: Int[np.ndarray, " b"] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless shuffled batches from `first_step` on, reshuffled every epoch.

    Resuming slices the stream instead of restoring an iterator, so it is exact for any number
    of processes and workers. `rows` are those of every global batch that this process reads
    (`sharding.local_rows`), in its order; None reads all of them:
    {"x": [len(rows), h, w, c], "label": [len(rows)]}. Row i of a batch is the same example
    whatever the number of processes.
    """
    rows = np.arange(batch_size) if rows is None else rows
    stream = grain.MapDataset.source(source).shuffle(seed=seed).repeat()
    stream = grain.MapDataset.source(_Rows(stream, batch_size, first_step, rows))
    stream = stream.batch(len(rows), drop_remainder=True)
    return iter(stream.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
