"""The queue, and the thread that empties it in full microbatches."""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from ppflow_jax.errors import RunError
from ppflow_jax.serve.device import Device, Made, Row, Way

WAIT = 0.005  # seconds that an incomplete microbatch waits for more
PATIENCE = 8  # microbatches that may overtake others
MOST_NEW = 4  # ways in the queue that are not compiled yet


class Full(RuntimeError):
    """No room in the queue; `seconds` later there may be."""

    def __init__(self, message: str, seconds: int):
        super().__init__(message)
        self.seconds = seconds


class Broken(RuntimeError):
    """Images that could not be made; the log has the traceback."""


class Picture(NamedTuple):
    """News for a job: image `at` of its rows, and all that was made with it."""

    at: int
    made: Made
    place: int


@dataclass(eq=False)
class Job:
    """Images of one request.

    Attributes:
      tell: is given each `Picture`, or an exception, by the thread of the batcher.
    """

    way: Way
    rows: list[Row]
    tell: Callable[[Picture | Exception], None]
    arrived: float = field(default_factory=time.monotonic)


class _Waiting(NamedTuple):
    job: Job
    at: int


@dataclass(eq=False)
class _Group:
    """What waits for the same microbatches."""

    way: Way
    rows: deque[_Waiting] = field(default_factory=deque)
    overtaken: int = 0


class Batcher:
    """Makes the images of all jobs, those of equal ways together.

    Args:
      most: images that may wait.

    Attributes:
      ready: set when the first way is compiled.
      failed: what ended the thread before its time.
      microbatches, images: made so far.
    """

    def __init__(self, device: Device, most: int):
        self.device, self.most = device, most
        self.ready, self.failed = threading.Event(), None
        self.microbatches = self.images = 0
        self._groups: dict[Hashable, _Group] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._seconds = 1.0  # of a microbatch, lately

    def start(self, first: Way, then: Callable[[], None] = lambda: None) -> None:
        """Compile `first`, call `then`, and work, unless that `failed`."""
        self._thread = threading.Thread(
            target=self._work, args=(first, then), name="devices", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Finish the queue; returns when all is done."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def waiting(self) -> int:
        with self._changed:
            return self._count()

    def submit(self, job: Job) -> None:
        """
        Raises:
          Full: no room for it.
        """
        with self._changed:
            if self._stopping:
                raise Full("the service is stopping", 10)
            if self._count() + len(job.rows) > self.most:
                waiting = f"{self._count()} images are waiting, at most {self.most} may"
                raise Full(waiting, self._soon())
            key = job.way.key
            new = [g for g in self._groups.values() if not self.device.ready(g.way)]
            if key not in self._groups and not self.device.ready(job.way) and len(new) >= MOST_NEW:
                raise Full(f"{len(new)} other plans wait to be compiled", self._soon())
            group = self._groups.setdefault(key, _Group(job.way))
            group.rows.extend(_Waiting(job, at) for at in range(len(job.rows)))
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Forget what of it has not begun."""
        with self._changed:
            key = job.way.key
            if group := self._groups.get(key):
                group.rows = deque(row for row in group.rows if row.job is not job)
                if not group.rows:
                    del self._groups[key]

    def _count(self) -> int:
        return sum(len(group.rows) for group in self._groups.values())

    def _soon(self) -> int:
        return max(1, math.ceil(self._seconds * self._count() / self.device.size))

    def _work(self, first: Way, then: Callable[[], None]) -> None:
        try:
            for _ in self.device.run(first, [Row(0, 0, 0)]):
                pass
            self.ready.set()
        except Exception as e:  # told by whoever started the batcher
            self.failed = e
        then()
        if self.failed:
            return
        while taken := self._take():
            self._make(*taken)

    def _take(self) -> tuple[Way, list[_Waiting]] | None:
        """The next microbatch; None when all is done and no more comes."""
        with self._changed:
            while (group := self._next()) is None:
                if self._stopping and not self._groups:
                    return None
                self._changed.wait(self._left())
            rows = [group.rows.popleft() for _ in range(min(self.device.size, len(group.rows)))]
            for other in self._groups.values():
                other.overtaken += 1
            group.overtaken = 0
            if not group.rows:
                del self._groups[group.way.key]
            return group.way, rows

    def _next(self) -> _Group | None:
        """The group that is due: the oldest full one, unless an older one has waited too long."""
        groups = sorted(self._groups.values(), key=lambda g: g.rows[0].job.arrived)
        if not groups:
            return None
        full = [group for group in groups if len(group.rows) >= self.device.size]
        if full and groups[0].overtaken < PATIENCE:
            return full[0]
        return groups[0] if full or self._stopping or self._left() <= 0 else None

    def _left(self) -> float | None:
        """Seconds until the oldest job has waited long enough; None without jobs."""
        arrived = [group.rows[0].job.arrived for group in self._groups.values()]
        return max(0.0, min(arrived) + WAIT - time.monotonic()) if arrived else None

    def _make(self, way: Way, taken: list[_Waiting]) -> None:
        start = time.monotonic()
        jobs = list(dict.fromkeys(row.job for row in taken))
        try:
            for made in self.device.run(way, [row.job.rows[row.at] for row in taken]):
                for place, row in enumerate(taken):
                    row.job.tell(Picture(row.at, made, place))
        except Exception as e:  # of these jobs alone; the others go on
            if not isinstance(e, RunError):
                traceback.print_exc()
                e = Broken("the service failed; its log says why")
            for job in jobs:
                job.tell(e)
            return
        self._seconds += 0.2 * (time.monotonic() - start - self._seconds)
        self.microbatches += 1
        self.images += len(taken)
