"""Cells of Parquet and Arrow files by the number of their row, through pyarrow.

A Parquet file is read by row groups, the smallest part that can be decoded. Those that were read
last are kept, up to `KEPT` bytes, so reading in order decodes each of them once and reading at
random almost one for every cell. An Arrow file is mapped into memory: a cell costs itself alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

KEPT = 2**28  # bytes of row groups
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream that was written to its end


class RowGroups:
    """The row groups that were read last, of all files of a dataset; pickled without them."""

    def __init__(self, most: int = KEPT):
        self.most = most
        self._lock = threading.Lock()
        self._kept: OrderedDict[Any, Future] = OrderedDict()
        self._bytes = 0

    def __reduce__(self):
        return RowGroups, (self.most,)

    def get(self, key: Any, read: Callable[[], Any]) -> Any:
        """What `read` gives for `key`: once, also where several threads ask for it at a time."""
        with self._lock:
            if found := self._kept.get(key):
                self._kept.move_to_end(key)
            else:
                mine = self._kept[key] = Future()
        if found:
            return found.result()
        try:
            made = read()
        except BaseException as e:
            with self._lock:
                del self._kept[key]
            mine.set_exception(e)
            raise
        mine.set_result(made)
        with self._lock:
            self._bytes += made.nbytes
            for old in list(self._kept):
                if self._bytes <= self.most or old == key:
                    break
                if self._kept[old].done():
                    self._bytes -= self._kept.pop(old).result().nbytes
        return made


class ParquetFile:
    """A Parquet file.

    Raises:
      OSError, pyarrow.ArrowInvalid: it is none, or damaged.
    """

    def __init__(self, path: Path, groups: RowGroups):
        import pyarrow.parquet as pq

        self.path, self._groups = path, groups
        with pq.ParquetFile(path) as file:
            self._metadata, self.schema = file.metadata, file.schema_arrow
        self._first = np.cumsum([0, *(rows for _, rows in self._groups_of())])

    def __len__(self) -> int:
        return int(self._first[-1])

    def column(self, name: str) -> Any:
        """All of a column, pyarrow.ChunkedArray."""
        return self._read(None, name)

    def cell(self, name: str, row: int) -> Any:
        """A value, as Python has it.

        Raises:
          OSError, pyarrow.ArrowInvalid: its row group is damaged.
        """
        group = int(np.searchsorted(self._first, row, "right")) - 1
        values = self._groups.get((self.path, group, name), lambda: self._read(group, name))
        return values[row - int(self._first[group])].as_py()

    def largest(self) -> tuple[int, int]:
        """Bytes and rows of the largest row group."""
        return max(self._groups_of(), default=(0, 0))

    def _groups_of(self) -> list[tuple[int, int]]:
        groups = map(self._metadata.row_group, range(self._metadata.num_row_groups))
        return [(group.total_byte_size, group.num_rows) for group in groups]

    def _read(self, group: int | None, name: str) -> Any:
        import pyarrow.parquet as pq

        # Opened anew: one reader is not for several threads, and may be of thousands of files
        checks = dict(metadata=self._metadata, page_checksum_verification=True)
        with pq.ParquetFile(self.path, **checks) as file:
            options = dict(columns=[name], use_threads=False)
            if group is None:
                return file.read(**options).column(name)
            return file.read_row_group(group, **options).column(name)


class ArrowFile:
    """An Arrow file, of either format, written to its end; mapped again in worker processes.

    Raises:
      OSError, pyarrow.ArrowInvalid: it is none, or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self.schema = self._table.schema

    @cached_property
    def _table(self) -> Any:
        import pyarrow as pa

        mapped = pa.memory_map(str(self.path))
        if mapped.read_at(6, 0) == b"ARROW1":
            return pa.ipc.open_file(mapped).read_all()
        if mapped.read_at(len(_END), max(0, mapped.size() - len(_END))) != _END:
            raise pa.ArrowInvalid("it ends too early")
        return pa.ipc.open_stream(mapped).read_all()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_table"}

    def __len__(self) -> int:
        return self._table.num_rows

    def column(self, name: str) -> Any:
        """All of a column, pyarrow.ChunkedArray."""
        return self._table.column(name)

    def cell(self, name: str, row: int) -> Any:
        """A value, as Python has it."""
        return self._table.column(name)[row].as_py()

    def largest(self) -> tuple[int, int]:
        """Nothing has to be decoded for a cell."""
        return 0, 0
