"""Long outputs in shards: a killed command continues from its finished ones.

Shard s of n processes is made by process s mod n, whole and always in the same way, and put in its
place at once. So it has the same bytes whether or not anything was killed before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ppflow_jax.errors import RunError


@dataclass(frozen=True)
class Shards:
    """The shards of `count` records.

    Attributes:
      folder: where they are.
      size: records of a shard; the last one may have less.
      finished: whether a shard is there as it was written.
    """

    folder: Path
    count: int
    size: int
    finished: Callable[[int], bool]

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def records(self, shard: int) -> range:
        """Numbers of its records."""
        return range(shard * self.size, min((shard + 1) * self.size, self.count))

    def left(self, process: int, processes: int) -> list[int]:
        """Shards that this process still has to make."""
        return [s for s in range(process, len(self), processes) if not self.finished(s)]

    def done(self) -> int:
        """Records in the finished shards of all processes."""
        return sum(len(self.records(s)) for s in range(len(self)) if self.finished(s))

    @contextlib.contextmanager
    def room(self) -> Iterator[None]:
        """Where shards are written.

        Raises:
          RunError: instead of the error of a full or lost disk.
        """
        try:
            yield
        except OSError as e:
            raise RunError(
                f"cannot write in {self.folder} ({e.strerror or e}); {self.done()} of "
                f"{self.count} are kept: make room, and give the same command to continue"
            ) from e
