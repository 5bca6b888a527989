"""One writer of a folder in an object store, which has no locks.

    FOLDER/.lease/000007     who has it, as JSON; its holder writes it again every BEAT seconds

A process takes the lease by creating the next number, which of several only one can do (GCS by
generation 0 as precondition, S3 by If-None-Match). It may when the number before was let go, when
its holder was a process of this machine that is no more, or when it has not been written again for
STALE seconds. A holder that finds a higher number has lost the lease and must not write.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppflow_jax.errors import InputError, RunError
from ppflow_jax.files.place import ObjectPath

FOLDER = ".lease"
BEAT = 10.0
STALE = 60.0
_held: list[Lease] = []


class Lease:
    """The lease of `folder`, taken. `lost` says why it is not any more.

    Raises:
      InputError: another process has it.
    """

    def __init__(self, folder: ObjectPath):
        self.folder, self.lost = folder, ""
        self.facts = {
            "token": uuid.uuid4().hex,
            "process": os.getpid(),
            "host": socket.gethostname(),
            "machine": _machine(),
            "started": _started(os.getpid()),
        }
        self.number = self._take()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def _take(self) -> int:
        number = max(self._numbers(), default=0)
        if number and not _is_free(before := self._object(number)):
            raise InputError(
                f"{self.folder} is in use by {_holder(before)}: wait for it, stop it, or give "
                "another folder"
            )
        mine = self._object(number + 1)
        try:
            mine.write_bytes(self._text(0), create=True)
        except FileExistsError as e:  # or an answer was lost, and it is ours
            if (_read(mine) or {}).get("token") != self.facts["token"]:
                raise InputError(
                    f"{self.folder} is in use by {_holder(mine)}, which was faster: wait for it, "
                    "or give another folder"
                ) from e
        if max(self._numbers()) > number + 1:
            mine.unlink(missing_ok=True)
            raise InputError(f"{self.folder} was taken by another process: give another folder")
        for old in self._numbers():
            if old <= number:
                self._object(old).unlink(missing_ok=True)
        return number + 1

    def _numbers(self) -> list[int]:
        found = (self.folder / FOLDER).iterdir()
        return [int(path.name) for path in found if path.name.isdigit()]

    def _object(self, number: int) -> ObjectPath:
        return self.folder / FOLDER / f"{number:06d}"

    def _text(self, beat: int, **more: Any) -> bytes:
        return json.dumps(self.facts | {"beat": beat} | more).encode()

    def _beat(self) -> None:
        good, beat = time.monotonic(), 0
        while not self._ended.wait(BEAT):
            try:
                if max(self._numbers(), default=0) > self.number:
                    self.lost = "another process has taken it"
                    return
                beat += 1
                self._object(self.number).write_bytes(self._text(beat))
                good = time.monotonic()
            except (OSError, InputError) as e:
                if time.monotonic() - good > STALE:
                    self.lost = f"its lease could not be renewed ({e})"
                    return

    def release(self) -> None:
        """Let it go, and say so in its object."""
        self._ended.set()
        self._thread.join()
        if not self.lost:
            self._object(self.number).write_bytes(self._text(0, free=True))


@contextlib.contextmanager
def leased(folder: ObjectPath) -> Iterator[None]:
    """Keep other processes that ask the same out of `folder` until the block ends.

    Raises:
      InputError: another process has it.
    """
    lease = Lease(folder)
    _held.append(lease)
    try:
        yield
    finally:
        _held.remove(lease)
        with contextlib.suppress(OSError):  # it is stale soon
            lease.release()


def check(path: Path) -> None:
    """
    Raises:
      RunError: a lease of this process for a folder above `path` was lost.
    """
    for lease in _held:
        if lease.lost and path.is_relative_to(lease.folder):
            raise RunError(
                f"{lease.folder} is not this process's any more, {lease.lost}: nothing more is "
                "written; see which of the two shall continue"
            )


def _is_free(held: ObjectPath) -> bool:
    """Whether nobody holds the lease; waits for a heartbeat where it cannot know."""
    facts = _read(held)
    if facts is None or facts.get("free"):
        return True
    if facts.get("machine") == _machine():
        return _started(int(facts["process"])) != facts.get("started")
    print(
        f"{held.parents[1]} was held by {_holder(held)}: waiting up to {STALE:.0f} s to see "
        "whether it lives",
        file=sys.stderr,
        flush=True,
    )
    until = time.monotonic() + STALE
    while time.monotonic() < until:
        time.sleep(min(2.0, STALE / 10))
        now = _read(held)
        if now is None or now.get("free"):
            return True
        if now != facts:
            return False
    return True


def _read(path: ObjectPath) -> dict[str, Any] | None:
    """Facts of a holder; None if the object is gone or is none of ours."""
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return values if isinstance(values, dict) and "process" in values else None


def _holder(path: ObjectPath) -> str:
    facts = _read(path)
    return f"process {facts['process']} on {facts['host']}" if facts else "another run"


def _machine() -> str:
    """Of this boot and, in containers, of this space of process numbers; "" if not to be known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink(
            "/proc/self/ns/pid"
        )
    except OSError:
        return f"unknown {uuid.uuid4().hex}"


def _started(process: int) -> str:
    """When a process of this machine was started, in ticks; "" if there is none."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
