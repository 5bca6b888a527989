"""What this machine takes for a training step or a sampler: measured once, kept, and used again.

Seconds are a sum of what a program does, each with a price that is never negative: FLOPs of dense
products, FLOPs of attention, bytes of activations, parameters passed (AdamW and EMA, or the weights
of an evaluation), blocks run one after another, and the program itself. `calibrate.py` times a
few small programs, and non-negative least squares of their relative errors gives the prices.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic
from ppflow_jax.flow.plan import Segment
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import block_traffic, forward_flops

PRICES = ("dense FLOP", "attention FLOP", "element", "parameter", "block", "program")
LEAST_SPREAD = 0.1  # of an estimate, as no machine is quieter from one hour to the next
AGAIN = "run: ppflow bench --calibrate"

Counts = Float[np.ndarray, " prices"]


def training_counts(
    model: ModelConfig, pattern: Sequence[int], parameters: int, batch: float, evaluated=()
) -> Counts:
    """What a training step does, one for each of `PRICES`.

    Args:
      pattern: stage of every sample of one period of the batch.
      batch: images on this device.
      evaluated: stages of what is evaluated without gradient for a period.
    """
    passes = (*tuple(pattern) * 3, *evaluated)
    per_image = sum(_evaluation(model, stage) for stage in passes) / len(pattern)
    once = (parameters, model.depth * len(set(pattern)), 1.0)
    return np.array([*(batch * per_image), *once])


def sampling_counts(
    model: ModelConfig, segments: tuple[Segment, ...], parameters: int, batch: float
) -> Counts:
    """What a plain sampler does for `batch` images on this device, one for each of `PRICES`."""
    work, evaluations = np.zeros(3), 0
    for segment in segments:
        for stage, guided in zip(segment.stages, segment.guided):
            work += segment.steps * (1 + guided) * batch * _evaluation(model, stage)
            evaluations += segment.steps
    return np.array([*work, parameters * evaluations, model.depth * evaluations, len(segments)])


def _evaluation(model: ModelConfig, stage: int) -> Float[np.ndarray, " 3"]:
    """Dense FLOPs, those of attention, and elements of activations of one image."""
    rows, cols = model.pyramid.grid(stage, model.latent_size)
    attention = 4 * (rows * cols) ** 2 * model.width * model.depth
    if not model.has_trunk:  # those that there are have none
        attention = 0
    dense = forward_flops(model, stage) - attention
    return np.array([dense, attention, block_traffic(model, stage)], float)


@dataclass(frozen=True)
class Fit:
    """Prices of one kind of program.

    Attributes:
      prices: seconds of one of each of `PRICES`.
      spread: the largest relative error on the programs that it comes from.
    """

    prices: tuple[float, ...]
    spread: float

    @classmethod
    def of(cls, counts: Sequence[Counts], seconds: Sequence[float]) -> Fit:
        """Least squares of relative errors, no price below zero."""
        from scipy.optimize import nnls

        relative = np.array(counts) / np.array(seconds)[:, None]
        scale = np.maximum(relative.max(axis=0), 1e-300)  # the counts differ by 12 orders
        found, _ = nnls(relative / scale, np.ones(len(seconds)))
        error = float(np.abs(relative / scale @ found - 1).max())
        return cls(tuple((found / scale).tolist()), error)

    def seconds(self, counts: Counts) -> float:
        return float(np.dot(self.prices, counts))

    def range(self, counts: Counts) -> tuple[float, float]:
        """Seconds, at least and at most."""
        spread = max(self.spread, LEAST_SPREAD)
        return self.seconds(counts) * (1 - min(spread, 0.9)), self.seconds(counts) * (1 + spread)


@dataclass(frozen=True)
class Calibration:
    """What was measured on a machine.

    Attributes:
      device, jax, date: what it is of; another device or version of jax makes it stale.
      dtype: of matrix products.
      ceiling: FLOP/s of plain matrix products.
      memory_rate: bytes/s of copying an array, read and written.
      fits: of `train` and `sample`.
    """

    device: str
    jax: str
    date: str
    dtype: str
    ceiling: float
    memory_rate: float
    fits: dict[str, Fit]

    @classmethod
    def read(cls) -> Calibration:
        """That of this machine.

        Raises:
          InputError: there is none, or it is of another machine or version of jax.
        """
        path = kept_in()
        try:
            values = json.loads(path.read_text())
            fits = {
                name: Fit(tuple(f["prices"]), f["spread"]) for name, f in values["fits"].items()
            }
            found = cls(**values | {"fits": fits})
        except FileNotFoundError as e:
            raise InputError(f"this machine has not been measured: {AGAIN}") from e
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise InputError(f"cannot read {path} ({type(e).__name__}: {e}): {AGAIN}") from e
        for what, old, now in (
            ("device", found.device, device_name()),
            ("jax", found.jax, jax.__version__),
        ):
            if old != now:
                raise InputError(f"{path} is of {what} {old}, this is {now}: {AGAIN}")
        return found

    def write(self) -> Path:
        path = kept_in()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path

    def check_dtype(self, dtype: str) -> None:
        """
        Raises:
          InputError: it was measured with another dtype.
        """
        if dtype != self.dtype:
            raise InputError(
                f"this machine was measured in {self.dtype}, config.model.dtype is {dtype}: "
                f"{AGAIN} --dtype={dtype}"
            )


def kept_in() -> Path:
    """The file, in the user's folder of caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "ppflow_jax" / "calibration.json"


def device_name() -> str:
    """Kind and number of the devices; of CPUs the processor and the cores that may be used."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} {devices[0].device_kind}"
    return f"{processor()}, {len(_cores())} cores, {len(devices)} device(s)"


def processor() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:  # no Linux
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _cores() -> Any:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
