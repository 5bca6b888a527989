"""The training stream: a pure function of (seed, step, rows of the batch)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
class _Batch:
    """Reads what one process sees of the global batch of a step.

    Position p of the stream is example p mod n of a shuffle that is new every epoch; the batch of
    a step is `batch_size` positions, of which a process reads those of its `rows`.
    """

    source: Source
    order: grain.MapDataset
    batch_size: int
    seed: int
    flip: bool
    rows: Int[np.ndarray, " b"]

    @classmethod
    def of(
        cls, source: Source, batch_size: int, seed: int, flip: bool, rows: np.ndarray | None
    ) -> _Batch:
        order = grain.MapDataset.range(len(source)).shuffle(seed=seed).repeat()
        rows = np.arange(batch_size) if rows is None else rows
        return cls(source, order, batch_size, seed, flip, rows)

    def indices(self, step: int) -> Int[np.ndarray, " b"]:
        positions = (step * self.batch_size + self.rows).tolist()
        return np.fromiter((self.order[p] for p in positions), np.int64, len(positions))

    def named(self, step: int, row: int, batch: Mapping[str, np.ndarray]) -> str:
        """One of the examples of `batch`, for messages."""
        return (
            f"example {self.indices(step)[row]} (label {batch['label'][row]}) of {self.source.name}"
        )

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        flips = np.random.default_rng((self.seed, step)).random(self.batch_size)[self.rows] < 0.5
        return self.source.read(self.indices(step), flips & self.flip)


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    num_classes: int,
    flip: bool = False,
    workers: int = 0,
    skip_unreadable: bool = False,
    report: Callable[[str], None] = print,
    rows: Int[np.ndarray, " b"] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless shuffled batches from `first_step` on, reshuffled every epoch.

    Resuming starts at a step instead of restoring an iterator, so it is exact for any number of
    processes and workers. `rows` are those of every global batch that this process reads
    (`sharding.local_rows`), in its order; None reads all of them. Arrays have these rows as their
    leading axis: "label" and what else `source.read` gives. Row i of a batch is the same example
    whatever the number of processes. `flip` mirrors every example with probability 1/2, drawn anew
    at every visit. `workers` are processes; 0 reads in threads of this one. The name of a picture
    that cannot be read goes to `report` once, with the number so far.

    Raises:
      InputError: a picture cannot be read (without `skip_unreadable`); a label is not in
        [0, num_classes); a latent is not finite, or its standard deviation negative.
    """
    read = _Batch.of(source, batch_size, seed, flip, rows)
    stream = iter(parallel(grain.MapDataset.range(first_step, sys.maxsize).map(read), workers))
    skipped: set[int] = set()
    for step, batch in enumerate(stream, first_step):
        for index in sorted(set(batch.pop("unreadable", np.int64([])).tolist()) - skipped - {-1}):
            skipped.add(index)
            problem = explain(source, index)
            if not skip_unreadable:
                raise InputError(
                    f"cannot read {problem} of {source.name}: mend or remove it, or set "
                    "config.data.unreadable=skip"
                )
            report(
                f"cannot read {problem}; the next one stands in ({len(skipped)} of "
                f"{len(source)} so far)"
            )
        labels = batch["label"]
        check_labels(source.name, int(labels.min()), int(labels.max()), num_classes)
        if bad := bad_values(batch):
            raise InputError(
                f"{read.named(step, bad[0], batch)}: {bad[1]}: mend or remove it, or make the "
                "latents again"
            )
        yield batch


def suspect(source: Source, *, batch_size: int, seed: int, step: int, flip: bool) -> str | None:
    """The example of the global batch of `step` with the largest values, if they are absurd.

    For a loss that is not finite; step and settings as in `batches`.
    """
    read = _Batch.of(source, batch_size, seed, flip, None)
    batch = read(step)
    found = large_values(batch)
    return f"{read.named(step, found[0], batch)}: {found[1]}" if found else None


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
        "and start again; a run goes on from its last checkpoint"
    )
