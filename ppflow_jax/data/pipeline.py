"""The training stream: a pure function of (seed, step, process)."""

from __future__ import annotations

from collections.abc import Iterator

import grain
import numpy as np

from ppflow_jax.data.sources import ArraySource


def batches(
    source: ArraySource,
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless shuffled batches from `first_step` on, reshuffled every epoch.

    Resuming slices the stream instead of restoring an iterator, so it is exact for any number
    of processes and workers. Each process reads every `process_count`-th example of the global
    batch: {"x": [batch_size / process_count, h, w, c], "label": [...]}.
    """
    stream = grain.MapDataset.source(source).shuffle(seed=seed).repeat()
    stream = stream[first_step * batch_size + process_index :: process_count]
    stream = stream.batch(batch_size // process_count, drop_remainder=True)
    return iter(stream.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
