"""Parts of an hour for tests/test_gpu_hour.py, which its processes import."""

from __future__ import annotations

import os
import signal
import time

from benchmarks.hour.work import Skip, Work
from ppflow_jax.errors import InputError


def good(work: Work) -> None:
    work.each([("one", lambda: {"said": "fine"}), ("two", lambda: {"good": True})])


def fails_once(work: Work) -> None:
    """A row that fails as long as a file is not there, which it makes."""

    def row():
        marker = work.settings.out / "marker"
        if not marker.exists():
            marker.touch()
            raise RuntimeError("out of luck\nmore of it")
        return {}

    work.each([("first", lambda: {"stamp": time.time_ns()}), ("second", row), ("third", dict)])


def ends(work: Work) -> None:
    work.record.add("kept", {})
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(work: Work) -> None:
    work.record.add("kept", {})
    time.sleep(600)


def skipped(work: Work) -> None:
    raise Skip("nothing of that kind is here")


def over(work: Work) -> None:
    work.each([("difference", lambda: {"value": 1.0, "bound": 0.1, "good": False})])


def broken(work: Work) -> None:
    raise InputError("figures of another device")
