"""The training stream: a pure function of (seed, step, rows of the batch)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Bool, Int

from ppflow_jax.data.checks import bad_values, check_labels, large_values
from ppflow_jax.data.classes import Classes
from ppflow_jax.data.pictures import Pictures, UnreadablePicture
from ppflow_jax.errors import InputError

THREADS = 4  # batches read at once where there are no worker processes


@runtime_checkable
class Source(Protocol):
    """A dataset that is read in whole batches; pickled into worker processes."""

    name: str

    def __len__(self) -> int: ...

    def read(
        self, indices: Int[np.ndarray, " b"], flips: Bool[np.ndarray, " b"]
    ) -> dict[str, np.ndarray]:
        """Arrays with leading axis b, among them "label"; mirrored where `flips`, if possible."""
        ...

    def identity(self) -> dict[str, Any]: ...

    def check_fits(self, shape: tuple[int, int, int], num_classes: int) -> None: ...

    def classes(self) -> Classes | None: ...

    def notes(self) -> list[str]: ...


@dataclass(frozen=True)
class Stream:
    """Shuffled batches of a source, reshuffled every epoch.

    Position p of the stream is example p mod n of a shuffle that is new every epoch; the batch of a
    step is `batch_size` positions, of which row i is the same for any number of processes.

    Attributes:
      num_classes: labels must be below.
      flip: mirror every example with probability 1/2, drawn again at every visit.
      workers: processes that read; 0 reads in threads of this one.
      skip_unreadable: the next picture stands in for one that cannot be read.
      rows: those of every global batch that this process reads (`sharding.local_rows`), in its
        order; None reads all of them.
    """

    source: Source
    batch_size: int
    seed: int
    num_classes: int
    flip: bool = False
    workers: int = 0
    skip_unreadable: bool = False
    rows: Int[np.ndarray, " b"] | None = None

    def batches(
        self, first_step: int = 0, report: Callable[[str], None] = print
    ) -> Iterator[dict[str, np.ndarray]]:
        """Endless batches from `first_step` on: "label", and what else `source.read` gives.

        Resuming starts at a step instead of restoring an iterator, so it is exact for any number
        of processes and workers. The name of a picture that cannot be read goes to `report` once,
        with the number so far.

        Raises:
          InputError: a picture cannot be read (without `skip_unreadable`); a label is not in
            [0, num_classes); a latent is not finite, or its standard deviation negative.
        """
        read, source = _Batch.of(self), self.source
        steps = grain.MapDataset.range(first_step, sys.maxsize)
        skipped: set[int] = set()
        for step, batch in enumerate(iter(parallel(steps.map(read), self.workers)), first_step):
            unreadable = set(batch.pop("unreadable", np.int64([])).tolist())
            for index in sorted(unreadable - skipped - {-1}):
                skipped.add(index)
                problem = explain(source, index)
                if not self.skip_unreadable:
                    raise InputError(
                        f"cannot read {problem} of {source.name}: mend or remove it, or set "
                        "config.data.unreadable=skip"
                    )
                report(
                    f"cannot read {problem}; the next one stands in ({len(skipped)} of "
                    f"{len(source)} so far)"
                )
            labels = batch["label"]
            check_labels(source.name, int(labels.min()), int(labels.max()), self.num_classes)
            if bad := bad_values(batch):
                raise InputError(
                    f"{read.named(step, bad[0], batch)}: {bad[1]}: mend or remove it, or make the "
                    "latents again"
                )
            yield batch

    def examples(self, step: int) -> Int[np.ndarray, " b"]:
        """Numbers of the examples in the global batch of `step`, counted from 0, in its order.

        For one that cannot be read another may stand in.
        """
        return _Batch.of(replace(self, rows=None)).indices(step)

    def suspect(self, step: int) -> str | None:
        """The example of the global batch of `step` with the largest values, if they are absurd.

        For a loss that is not finite.
        """
        read = _Batch.of(replace(self, rows=None))
        batch = read(step)
        found = large_values(batch)
        return f"{read.named(step, found[0], batch)}: {found[1]}" if found else None


@dataclass(frozen=True)
class _Batch:
    """Reads what one process sees of the global batch of a step; pickled into worker processes."""

    stream: Stream
    order: grain.MapDataset
    rows: Int[np.ndarray, " b"]

    @classmethod
    def of(cls, stream: Stream) -> _Batch:
        order = grain.MapDataset.range(len(stream.source)).shuffle(seed=stream.seed).repeat()
        every = np.arange(stream.batch_size)
        return cls(stream, order, every if stream.rows is None else stream.rows)

    def indices(self, step: int) -> Int[np.ndarray, " b"]:
        positions = (step * self.stream.batch_size + self.rows).tolist()
        return np.fromiter((self.order[p] for p in positions), np.int64, len(positions))

    def named(self, step: int, row: int, batch: Mapping[str, np.ndarray]) -> str:
        """One of the examples of `batch`, for messages."""
        index, label = self.indices(step)[row], batch["label"][row]
        return f"example {index} (label {label}) of {self.stream.source.name}"

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        drawn = np.random.default_rng((self.stream.seed, step)).random(self.stream.batch_size)
        flips = (drawn[self.rows] < 0.5) & self.stream.flip
        return self.stream.source.read(self.indices(step), flips)


def parallel(dataset: grain.MapDataset, workers: int) -> grain.IterDataset:
    """`dataset` in order, its elements made by `workers` processes, or by threads if 0."""
    if not workers:
        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=THREADS)
        return dataset.to_iter_dataset(options)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    multiprocessing = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return dataset.to_iter_dataset(options).mp_prefetch(multiprocessing)


def explain(source: Pictures, index: int) -> str:
    """Name of a picture that could not be read, and why."""
    try:
        source.load(index)
    except UnreadablePicture as e:
        return str(e)
    raise InputError(
        f"{source.label_of(index)} could not be read a moment ago and now can: check the storage "
        "and start again; a run continues from its last checkpoint"
    )
