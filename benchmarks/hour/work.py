"""What a part is handed: its record, its time, and how its rows are made."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.hour.record import CUT, DONE, FAILED, RUNNING, SKIPPED, Record
from ppflow_jax.errors import InputError

Job = tuple[str, Callable[[], dict[str, Any]]]


class Skip(Exception):
    """A part that cannot be done here; the message says why."""


@dataclass(frozen=True)
class Settings:
    """What all parts are told.

    Attributes:
      out: folder of the records.
      tiny: small models and few rounds, to exercise everything on a CPU.
      latents: folder of the `arrays` source; empty: digits.
    """

    out: Path
    tiny: bool = False
    latents: str = ""

    def record(self, part: str) -> Record:
        return Record(self.out / f"{part}.json", part)

    @property
    def device(self) -> dict[str, Any]:
        """As `probe` found it."""
        return json.loads((self.out / "device.json").read_text())


@dataclass
class Work:
    """A part at work.

    Attributes:
      seconds: until its process is ended.
    """

    settings: Settings
    record: Record
    seconds: float
    start: float = field(default_factory=time.monotonic)
    longest: float = 0.0

    @property
    def tiny(self) -> bool:
        return self.settings.tiny

    @property
    def left(self) -> float:
        """Seconds."""
        return self.start + self.seconds - time.monotonic()

    def each(self, jobs: Iterable[Job]) -> None:
        """Rows in order: those that are there are kept, one that fails leaves its error, and none
        starts when half of the time of the longest is not left."""
        jobs = list(jobs)
        for number, (key, job) in enumerate(jobs):
            if self.record.has(key):
                continue
            if self.left < self.longest / 2:
                missing = [k for k, _ in jobs[number:] if not self.record.has(k)]
                self.record.write(left=[*self.record.values["left"], *missing])
                return
            begin = time.monotonic()
            row = outcome(job)
            took = time.monotonic() - begin
            self.longest = max(self.longest, took)
            self.record.add(key, row | {"took": round(took, 2)})
            said = row.get("error") or row.get("said", "")
            print(f"  {key}: {said} ({took:.1f} s)", flush=True)


def outcome(job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row of a job, or its error, whose traceback goes to the log."""
    try:
        return job()
    except Skip:
        raise
    except Exception as e:
        traceback.print_exc()
        return {"error": first_line(e)}


def first_line(e: BaseException) -> str:
    text = str(e).strip().splitlines()
    return f"{type(e).__name__}: {text[0][:300]}" if text else type(e).__name__


def end_with_parent() -> None:
    """This process ends when the one that started it does, however that ends."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def child(part: str, target: str, settings: Settings, seconds: float) -> None:
    """The process of a part: `target` is module:function, and takes a `Work`."""
    end_with_parent()
    log = os.open(settings.out / f"{part}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 2)  # of C++ too
    record = settings.record(part)
    work = Work(settings, record, seconds)
    before = record.values["seconds"]
    record.write(state=RUNNING, reason="", left=[])
    module, name = target.split(":")
    try:
        getattr(importlib.import_module(module), name)(work)
        failed = list(record.bad())
        state, reason = (FAILED, failed[0]) if failed else (DONE, "")
        if not failed and (left := record.values["left"]):
            state, reason = CUT, f"no time for {len(left)} rows"
    except Skip as e:
        state, reason = SKIPPED, str(e)
    except Exception as e:  # the other parts go on
        traceback.print_exc()
        state, reason = FAILED, first_line(e)
    spent = round(before + time.monotonic() - work.start, 1)
    record.write(state=state, reason=reason, seconds=spent)
    sys.stdout.flush()


def probe(settings: Settings) -> None:
    """Writes what the device is to device.json, or its failure; a process of its own."""
    import jax

    from benchmarks.hour.device import describe
    from ppflow_jax.files.disk import atomic

    end_with_parent()
    try:
        found = describe(jax.devices()[0])
    except RuntimeError as e:
        found = {"error": first_line(e)}
    with atomic(settings.out / "device.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")


def same_device(settings: Settings) -> None:
    """
    Raises:
      InputError: the records are of another device.
    """
    import jax

    here, there = jax.devices()[0].device_kind, settings.device["kind"]
    if here != there:
        raise InputError(f"{settings.out} holds figures of {there}, this is {here}: another --out")
