"""A process and a share of the time for every part, one after another."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.hour.record import CUT, DONE, FAILED, RUNNING, SKIPPED
from benchmarks.hour.work import Settings, child, probe
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic, locked

PATIENCE = 15  # seconds that a part has to end when it is told to
PROBING = 120


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
      share: of the time that is left, beside the shares of the parts after it.
      target: module:function.
    """

    name: str
    share: float
    target: str


def run(
    settings: Settings, parts: Sequence[Part], minutes: float, probed: bool = True
) -> dict[str, str]:
    """Does the parts that are not done, and returns the state of every one.

    A part that leaves time gives it to those after it. One that is out of time is told to stop,
    and then ended; it keeps its rows.

    Raises:
      InputError: the folder is in use or was filled with other settings; there is no device.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    with locked(settings.out):
        end = time.monotonic() + 60 * minutes
        _same(settings)
        if probed:
            _probed(settings)
        for number, part in enumerate(parts):
            record = settings.record(part.name)
            if record.state == DONE:
                print(f"{part.name}: done before", flush=True)
                continue
            rest = [p for p in parts[number:] if settings.record(p.name).state != DONE]
            seconds = max(0.0, end - time.monotonic()) * part.share / sum(p.share for p in rest)
            print(f"{part.name}: up to {seconds:.0f} s", flush=True)
            _one(settings, part, seconds)
        return {part.name: settings.record(part.name).state for part in parts}


def prepare_environment(settings: Settings) -> None:
    """Of the processes to be started, where the person has said nothing: most of the device's
    memory for the one that is there, and compiled programs kept for a call that continues."""
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & set(os.environ):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.9"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(settings.out / "compiled"))
    if settings.tiny:  # compiling is its time
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")


def _same(settings: Settings) -> None:
    mine = {"tiny": settings.tiny, "latents": settings.latents}
    path = settings.out / "settings.json"
    if not path.exists():
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(mine) + "\n")
    elif wrong := [k for k, v in json.loads(path.read_text()).items() if mine.get(k) != v]:
        raise InputError(f"{settings.out} was filled with another --{wrong[0]}: use another --out")


def _probed(settings: Settings) -> None:
    """Knows the device before the parts; a process that has asked would hold its memory."""
    path = settings.out / "device.json"
    if not path.exists():
        _ended(_started(probe, settings), PROBING)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if "kind" not in found:
        path.unlink(missing_ok=True)
        reason = found.get("error", "its process ended or did not answer")
        raise InputError(f"no device answers ({reason}): see that jax.devices() works")
    print(f"device: {found['kind']} ({found['platform']})", flush=True)


def _one(settings: Settings, part: Part, seconds: float) -> None:
    start = time.monotonic()
    process = _started(child, part.name, part.target, settings, seconds)
    in_time = _ended(process, seconds)
    record = settings.record(part.name)
    if record.state in ("", RUNNING):  # it could not say how it ended
        if in_time:
            state = FAILED
            reason = f"its process ended with exit code {process.exitcode}, see {part.name}.log"
        else:
            state, reason = CUT, "its time was over"
        spent = round(record.values["seconds"] + time.monotonic() - start, 1)
        record.write(state=state, reason=reason, seconds=spent)
    reason = record.values["reason"]
    print(f"{part.name}: {record.state}{reason and ': '}{reason}", flush=True)


def _started(target: Any, *args: Any) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    return process


def _ended(process: Any, seconds: float) -> bool:
    """Waits for it; whether it ended by itself."""
    process.join(seconds)
    if not process.is_alive():
        return True
    process.terminate()
    process.join(PATIENCE)
    process.kill()
    process.join()
    return False


def finished(states: dict[str, str]) -> bool:
    return all(state in (DONE, SKIPPED) for state in states.values())
