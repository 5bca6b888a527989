"""Records of ArrayRecord files in an object store, read by ranges and compared with checksums.

    SHARD.array_record          as on a disk
    SHARD.array_record.index    .npy: of every record, where its bytes begin and their CRC-32

`prepare` writes the index with the shard, before it. An ArrayRecord file without compression and in
groups of one record is a Riegeli file with one chunk a record: a header of 40 bytes, one byte that
says that nothing is compressed, the number and the sizes of its values, and the record itself. All
of it is interrupted by 24 bytes at every multiple of 64 KiB of the file (riegeli/doc/
riegeli_records_file_format.md). No checksum of Riegeli's own (HighwayHash) is used.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ppflow_jax.errors import InputError
from ppflow_jax.files.arrays import load_array
from ppflow_jax.files.copies import AT_ONCE
from ppflow_jax.files.disk import atomic
from ppflow_jax.files.objects import Damaged, ask
from ppflow_jax.files.place import ObjectPath

SUFFIX = ".index"
_BLOCK, _HEADER, _CHUNK = 2**16, 24, 40
_INDEX = np.dtype([("begin", "<u8"), ("crc32", "<u4")])
_READS = 3  # of a record that is not what was written


class RangedRecords:
    """The records of files in an object store, all of one size; pickled into worker processes.

    Raises:
      InputError: a file without an index, or with that of other records.
    """

    def __init__(self, shards: Sequence[tuple[ObjectPath, int]], size: int):
        """
        Args:
          shards: file and number of records of each.
          size: bytes of a record.
        """
        self._paths, self._size = [path for path, _ in shards], size
        with ThreadPoolExecutor(AT_ONCE) as pool:
            self._index = list(pool.map(_read_index, *zip(*shards))) if shards else []
        self._first = np.cumsum([0, *(count for _, count in shards)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitems__(self, keys: Sequence[int]) -> list[bytes]:
        """Records of these numbers, by requests at once.

        Raises:
          StoreError: see `objects.ask`; bytes that are not what was written.
        """
        wanted = list(keys)
        found: dict[int, bytes] = {}
        for _ in range(_READS):
            missing = [key for key in dict.fromkeys(wanted) if key not in found]
            if not missing:
                return [found[key] for key in wanted]
            for key, record in zip(missing, self._fetch(missing)):
                if zlib.crc32(record) == self._entry(key)[1]["crc32"]:
                    found[key] = record
        bad = next(key for key in wanted if key not in found)
        raise Damaged(5, f"record {bad} is not what was written", str(self._entry(bad)[0]))

    def _entry(self, key: int) -> tuple[ObjectPath, np.void]:
        shard = int(np.searchsorted(self._first, key, "right")) - 1
        return self._paths[shard], self._index[shard][key - self._first[shard]]

    def _fetch(self, keys: list[int]) -> Iterator[bytes]:
        places = [(path, int(entry["begin"])) for path, entry in map(self._entry, keys)]
        spans = [(begin, _end(begin, self._size)) for _, begin in places]
        urls = [str(path) for path, _ in places]
        starts, stops = zip(*spans)
        parts = ask(
            urls[0],
            lambda system: system.cat_ranges(urls, list(starts), list(stops), on_error="raise"),
        )
        for part, (begin, _) in zip(parts, spans):
            yield _joined(part, begin, 0, self._size)[0]


def save_index(path: ObjectPath, file: Path, records: int, size: int) -> None:
    """Write the index of the shard `path`, which `file` will be."""
    with atomic(path.with_name(path.name + SUFFIX)) as temporary, temporary.open("wb") as opened:
        np.save(opened, index_of(file, records, size))


def index_of(file: Path, records: int, size: int) -> np.ndarray:
    """The index of an ArrayRecord file on this machine with so many records of `size` bytes.

    Every record is compared with what ArrayRecord itself reads.

    Raises:
      ValueError: a file of another kind.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    found, reader = np.empty(records, _INDEX), ArrayRecordReader(str(file))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as data:
        for number, begin in zip(range(records), _records(data, size)):
            record, _ = _joined(data, 0, begin, size)
            if record != reader.read([number])[0]:
                raise ValueError(f"record {number} of {file} is not where it should be")
            found[number] = begin, zlib.crc32(record)
    reader.close()
    return found


def _records(data: mmap.mmap, size: int) -> Iterator[int]:
    """Where the bytes of every record begin."""
    at = 0
    while at < len(data):
        header, at = _joined(data, 0, at, _CHUNK)
        _, length, _, kind, _ = struct.unpack("<QQQQQ", header)
        if kind & 255 == ord("r"):
            _, begin = _joined(data, 0, at, length - size)
            yield begin + _HEADER * (begin % _BLOCK == 0)
        _, at = _joined(data, 0, at, length)
    raise ValueError("fewer records than there should be")


def _joined(data: bytes | mmap.mmap, offset: int, at: int, size: int) -> tuple[bytes, int]:
    """`size` bytes from `at` on without the headers of blocks, and where they end.

    Args:
      offset: where `data` begins in the file.
    """
    parts: list[bytes] = []
    while size:
        at += _HEADER * ((offset + at) % _BLOCK == 0)
        count = min(size, _BLOCK - (offset + at) % _BLOCK)
        parts.append(data[at : at + count])
        at, size = at + count, size - count
    return b"".join(parts), at


def _end(begin: int, size: int) -> int:
    """Where `size` bytes from `begin` on end in the file."""
    first = _BLOCK - begin % _BLOCK
    more = max(0, size - first)
    return begin + size + _HEADER * -(-more // (_BLOCK - _HEADER))


def _read_index(path: ObjectPath, count: int) -> np.ndarray:
    try:
        found = load_array(path.with_name(path.name + SUFFIX))
    except FileNotFoundError as e:
        raise InputError(
            f"{path} has no {SUFFIX} beside it, of `prepare` into an object store: set "
            "config.data.stage to a folder, where it is read from a copy"
        ) from e
    if found.dtype != _INDEX or found.shape != (count,):
        raise InputError(f"{path}{SUFFIX} is not the index of its {count} records: prepare again")
    return found
