"""Metrics of a run: files, TensorBoard events, trackers, the loss plot."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from ppflow_jax.console import say
from ppflow_jax.files.copies import borrowed
from ppflow_jax.files.disk import atomic
from ppflow_jax.files.place import ObjectPath
from ppflow_jax.files.scratch import scratch
from ppflow_jax.files.store import reason

EVERY = 30.0  # seconds at least between two uploads


@runtime_checkable
class Tracker(Protocol):
    """Another place that a run tells of itself, see trackers.py.

    Attributes:
      where: folder or address on this machine in which it keeps what it has; "": elsewhere.
    """

    name: str
    where: str

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def picture(self, step: int, path: Path) -> None: ...

    def close(self) -> None: ...


class MetricWriter:
    """Scalars to `metrics.jsonl`, to TensorBoard event files and to trackers.

    On resume, lines of steps after `step` are dropped, so that the file is that of one run. Only
    process 0 reads and writes. A tracker that fails is left out from then on, and that is said.
    Objects cannot grow: those of an object store are uploaded whole, now and then, and by `flush`.
    """

    def __init__(self, workdir: Path, step: int, trackers: Sequence[Tracker] = ()):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writes, self._trackers = jax.process_index() == 0, list(trackers)
        if not self._writes:
            return
        self.path = workdir / "metrics.jsonl"
        kept = [r for r in read_metrics(self.path) if r["step"] <= step]
        self._workdir, self._local, self._uploaded = workdir, workdir, time.monotonic()
        if isinstance(workdir, ObjectPath):
            self._local = scratch("log")
            self._local.mkdir()
        with atomic(self._local / self.path.name) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self._file = (self._local / self.path.name).open("a")
        self._events = EventFileWriter(str(self._local / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if not self._writes:
            return
        self.note(step, values)
        summary = [Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        self._events.add_event(Event(step=step, summary=Summary(value=summary)))
        self._each(lambda tracker: tracker.scalars(step, values), f"at step {step}")
        if time.monotonic() - self._uploaded > EVERY:
            self.flush()

    def picture(self, step: int, path: Path) -> None:
        """A sample grid, for the trackers."""
        if self._trackers:
            with borrowed(path) as file:
                self._each(lambda tracker: tracker.picture(step, file), f"at step {step}")

    def _each(self, tell: Callable[[Tracker], None], when: str) -> None:
        for tracker in tuple(self._trackers):
            try:
                tell(tracker)
            except Exception as e:  # each library has its own
                self._trackers.remove(tracker)
                say(
                    f"{tracker.name} failed {when} ({reason(e)}): the run goes on without it, "
                    "metrics.jsonl has all of it"
                )

    def note(self, step: int, facts: dict[str, Any]) -> None:
        """What happened in a step, in `metrics.jsonl` alone."""
        if self._writes:
            self._file.write(json.dumps({"step": step, **facts}) + "\n")
            self._file.flush()

    def flush(self) -> None:
        """Upload what is for an object store: before a checkpoint of these steps counts.

        Raises:
          OSError: the store does not take it.
        """
        if self._writes and isinstance(self._workdir, ObjectPath):
            self._events.flush()
            for file in sorted(self._local.rglob("*")):
                if file.is_file():
                    (self._workdir / str(file.relative_to(self._local))).upload(file)
            self._uploaded = time.monotonic()

    def close(self) -> None:
        if self._writes:
            self.flush()
            self._file.close()
            self._events.close()
            self._each(lambda tracker: tracker.close(), "at the end")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def save_loss_plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Loss over steps, total and by stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    names = sorted({k for r in rows for k in r if k.startswith("loss")})
    for name in names:
        points = [(r["step"], r[name]) for r in rows if name in r]
        axes.plot(*zip(*points), label=name, linewidth=2 if name == "loss" else 1)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    if names:
        axes.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
