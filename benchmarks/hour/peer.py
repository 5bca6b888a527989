"""Training steps and forward passes beside compiled PyTorch: bfloat16, on one device, in turn."""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.hour.models import PYRAMIDS, config_of, fitting
from benchmarks.hour.work import Job, Skip, Work, end_with_parent

SECONDS, LEAST, MOST = 4.0, 3, 15
SHARE = 0.45  # of the memory: the processes of both are there at once
# Kind, size, pyramid; in the order in which they are wanted
WORKS = (("train", "B", "SiT"), ("train", "XL", "SiT"), ("train", "B", "2 levels"))
WORKS += (("forward", "XL", "SiT"), ("train", "XL", "2 levels"))
BOUND = 5e-2  # of the relative difference of forward passes


def run(work: Work) -> None:
    platform = work.settings.device["platform"]
    if platform not in ("cpu", "gpu"):
        raise Skip(f"PyTorch is compared on GPUs (and CPUs), and this is a {platform}")
    if importlib.util.find_spec("torch") is None:
        raise Skip("PyTorch is not installed here: pip install torch==2.13.0, and the same command")
    from benchmarks.peer_torch import Side

    works = list(_works(work))
    with (
        contextlib.closing(Side(ours, works)) as mine,
        contextlib.closing(Side(theirs, works)) as other,
    ):
        (device, version), (their_device, their_version) = _ask(mine), _ask(other)
        if device != their_device:
            raise Skip(f"PyTorch has no CUDA here: {version}, {their_version}")
        work.each(_jobs(works, mine, other, f"{version}; {their_version}", work.tiny))


def _works(work: Work) -> Iterator[Any]:
    from benchmarks.peer_calls import Work as PeerWork

    memory, tiny = work.settings.device["memory"], work.tiny
    for kind, size, name in WORKS[:4] if tiny else WORKS:
        model = config_of(size, PYRAMIDS[name], tiny)
        batch = fitting(config_of(size, PYRAMIDS["SiT"], tiny), memory, SHARE)[0]
        stage = None if kind == "train" else 0
        only = ("eager",) if tiny else ("compiled",)
        yield PeerWork(
            *(f"{kind} {size} {name}", model, stage, batch),
            *("bfloat16", 2, "none", not tiny, only),
        )


def ours(works: list[Any], pipe: Any) -> None:
    """The process of JAX."""
    from benchmarks.peer_calls import serve_ours

    end_with_parent()
    serve_ours(works, pipe)


def theirs(works: list[Any], pipe: Any) -> None:
    """The process of PyTorch."""
    from benchmarks.peer_theirs import serve_theirs

    end_with_parent()
    serve_theirs(works, pipe)


def _ask(side: Any, *request: Any) -> Any:
    """
    Raises:
      RuntimeError: the process of that side ended.
    """
    try:
        return side.ask(*request)
    except (SystemExit, BrokenPipeError) as e:
        raise RuntimeError(f"{side.process.name} ended: {e}") from e


def _jobs(works: list[Any], mine: Any, other: Any, versions: str, tiny: bool) -> Iterator[Job]:
    for number, work in enumerate(works):
        given = number, work, mine, other
        yield work.name, lambda given=given: _measured(*given, tiny) | {"versions": versions}


def _measured(number: int, work: Any, mine: Any, other: Any, tiny: bool) -> dict[str, Any]:
    """One call at a time, ours and PyTorch's in turn."""
    (own,), (way,) = _ask(mine, number), _ask(other, number)
    begin = time.perf_counter()
    a, b = _ask(mine, number, own)[2], _ask(other, number, way)[2]
    row: dict[str, Any] = {"batch": work.batch, "way": way, "good": True}
    row["first_calls_seconds"] = time.perf_counter() - begin
    if work.stage is None:
        row |= {"losses": [float(a), float(b)], "good": bool(np.isfinite([a, b]).all())}
    else:
        row["difference"] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
        row["good"] = row["difference"] <= BOUND
    _ask(mine, number, own), _ask(other, number, way)  # the second is the first that is usual
    seconds: list[tuple[float, float]] = []
    begin = time.perf_counter()
    while len(seconds) < (3 if tiny else MOST):
        if len(seconds) >= LEAST and time.perf_counter() - begin > SECONDS:
            break
        seconds.append((_ask(mine, number, own)[0], _ask(other, number, way)[0]))
    row["ours"], row["theirs"] = (statistics.median(each) for each in zip(*seconds))
    row["ratio"] = row["ours"] / row["theirs"]
    row["images_per_second"] = [work.batch / row["ours"], work.batch / row["theirs"]]
    said = f"{1e3 * row['ours']:.1f} ms, PyTorch {1e3 * row['theirs']:.1f}"
    return row | {"said": f"{said}: {row['ratio']:.2f} of its time"}
