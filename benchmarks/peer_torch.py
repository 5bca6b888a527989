"""Time of JAX over time of PyTorch on equal work, in one run on one machine. Needs torch.

    python -m benchmarks.peer_torch                           # forward of B/2, training step of S/2
    JAX_NUM_CPU_DEVICES=2 python -m benchmarks.peer_torch     # on CPU: forward, a device a core
    python -m benchmarks.peer_torch --forward=XL --train=XL --dtype=bfloat16 --batch=64

Forward passes of every stage of 2 and 3 levels, and training steps (draws, loss, gradients, AdamW,
EMA) of SiT and of 2 levels, of the package and of `torch_model` with the same weights. Each of the
two has a process of its own, which waits while the other works: one call at a time, in turn, with
a rest in between, because thread pools spin for a while when their work is done. The ratio is that
of the medians over all rounds, ours over the fastest of PyTorch's ways: eager or compiled, each
stage at its own token count or, in training, packed with a mask as the public code does.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.peer_calls import Work, serve_ours
from ppflow_jax.console import table
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.stack import REMAT_POLICIES
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, SIT, Pyramid

_FORWARD = flags.DEFINE_string("forward", "B", "Size of the forward passes; empty: none.")
_TRAIN = flags.DEFINE_string("train", "S", "Size of the training steps; empty: none.")
_LATENT = flags.DEFINE_integer("latent_size", 32, "Side of the latent (4 channels).")
_BATCH = flags.DEFINE_integer("batch", 4, "Images of a forward pass.")
_TRAIN_BATCH = flags.DEFINE_integer("train_batch", 8, "Images of a training step.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Every round calls everything once.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of matrix products.")
_THREADS = flags.DEFINE_integer("threads", 2, "Of PyTorch; JAX takes the cores it is given.")
_COMPILE = flags.DEFINE_bool("compile", True, "Also torch.compile.")
_REST = flags.DEFINE_float("rest", 0.2, "Seconds between two calls.")
_REMAT = flags.DEFINE_enum("remat", "none", list(REMAT_POLICIES), "As config.model.remat; ours.")
_JSON = flags.DEFINE_string("json", "", "File for the figures.")


def works() -> list[Work]:
    found = []

    def add(name: str, size: str, pyramid: Pyramid, stage: int | None, batch: int) -> None:
        model = ModelConfig(pyramid, _LATENT.value, 4, **SIZES[size], num_classes=1000)
        settings = _DTYPE.value, _THREADS.value, _REMAT.value, _COMPILE.value
        found.append(Work(name, model, stage, batch, *settings))

    for name, pyramid in {"2 levels": PPFLOW2, "3 levels": PPFLOW3}.items():
        for stage in range(len(pyramid)) if _FORWARD.value else ():
            label = f"forward {_FORWARD.value} {name}, stage {stage}"
            add(label, _FORWARD.value, pyramid, stage, _BATCH.value)
    for name, pyramid in {"SiT": SIT, "2 levels": PPFLOW2}.items():
        if size := _TRAIN.value:
            add(f"train {size} {name}", size, pyramid, None, _TRAIN_BATCH.value)
    return found


@dataclass
class Case:
    """Times of one piece of work, by whom and in which way."""

    work: Work
    seconds: dict[str, list[float]] = field(default_factory=dict)
    processor: dict[str, list[float]] = field(default_factory=dict)  # of all threads

    def medians(self) -> dict[str, float]:
        return {way: statistics.median(s) for way, s in self.seconds.items()}

    def best(self) -> str:
        """The fastest of PyTorch's ways."""
        medians = self.medians()
        return min((way for way in medians if way != "jax"), key=medians.get)

    def ratio(self) -> float:
        medians = self.medians()
        return medians["jax"] / medians[self.best()]


class Side:
    """The process of one of the two."""

    def __init__(self, serve: Callable[..., None], works: list[Work]):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(works, other), name=serve.__name__)
        self.process.start()
        other.close()

    def ask(self, *request) -> Any:
        self.pipe.send(request)
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            raise SystemExit(
                f"{self.process.name} ended with exit code {code}, see above"
            ) from None

    def close(self) -> None:
        if self.process.is_alive():
            self.pipe.send(None)


def main(_) -> None:
    from benchmarks.peer_theirs import serve_theirs  # PyTorch, which our process does without

    with closing(Side(serve_ours, works())) as ours, closing(Side(serve_theirs, works())) as theirs:
        (device, version), (other, their_version) = ours.ask(), theirs.ask()
        if device != other:
            raise SystemExit(f"not the same device: {version}, {their_version}")
        _report(_measured(ours, theirs), version, their_version)


def _measured(*sides: Side) -> list[Case]:
    cases = []
    for number, work in enumerate(works()):
        calls = [(side, way) for side in sides for way in side.ask(number)]
        _agree(work, {way: side.ask(number, way)[2] for side, way in calls})
        cases.append((Case(work), number, calls))
    for _ in range(_ROUNDS.value):
        for case, number, calls in cases:
            for side, way in calls:
                time.sleep(_REST.value)
                seconds, processor, _ = side.ask(number, way)
                case.seconds.setdefault(way, []).append(seconds)
                case.processor.setdefault(way, []).append(processor)
    return [case for case, _, _ in cases]


def _agree(work: Work, results: dict[str, np.ndarray]) -> None:
    """Forward passes must give the same; training steps draw their own noise."""
    if work.stage is None:
        losses = ", ".join(f"{way} {float(value):.4f}" for way, value in results.items())
        print(f"{work.name}: losses {losses}", flush=True)
        return
    ours = results.pop("jax")
    for way, theirs in results.items():
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        print(f"{work.name} {way}: relative difference of the two {error:.1e}", flush=True)
        if not error < (1e-4 if _DTYPE.value == "float32" else 5e-2):
            raise SystemExit(f"{work.name} {way}: the two do not compute the same")


def _report(cases: list[Case], ours: str, theirs: str) -> None:
    print(
        f"\n{ours}, {theirs}, {_DTYPE.value}, batch {_BATCH.value} forward and "
        f"{_TRAIN_BATCH.value} in training; medians of {_ROUNDS.value} interleaved rounds"
    )
    head = ("work", "way", "ms", "quartiles", "GFLOP/s", "jax/this", "cpu ms", "jax/this", "")
    lines = [head]
    for case in cases:
        medians = case.medians()
        processor = {way: statistics.median(s) for way, s in case.processor.items()}
        for way, median in medians.items():
            low, _, high = statistics.quantiles(case.seconds[way], n=4)
            row = [case.work.name if way == "jax" else "", way, f"{1e3 * median:.1f}"]
            row += [f"{1e3 * low:.1f}-{1e3 * high:.1f}", f"{case.work.flops() / median / 1e9:.0f}"]
            row += [f"{medians['jax'] / median:.2f}", f"{1e3 * processor[way]:.1f}"]
            row += [f"{processor['jax'] / processor[way]:.2f}", "*" if way == case.best() else ""]
            lines.append(row)
    print(table(lines, left=(0, 1)))
    print(
        "*: the fastest way of PyTorch; its ratio counts. cpu ms: of all threads, on a busy machine"
    )
    if _JSON.value:
        rows = [
            {"work": c.work.name, "flops": c.work.flops(), "seconds": c.seconds, "ratio": c.ratio()}
            | {"processor_seconds": c.processor}
            for c in cases
        ]
        Path(_JSON.value).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
