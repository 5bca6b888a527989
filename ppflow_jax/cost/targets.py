"""Devices to compile for that need not be there."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from ppflow_jax.cost.calibration import Calibration
from ppflow_jax.cost.chips import CHIPS, GPUS, Chip
from ppflow_jax.errors import InputError

EXAMPLES = "here, cpu:8, gpu:h100:8, tpu:v5e:4x4, tpu:v5p:8x8x16, tpu:v6e:16x16 or tpu:tpu7x:4x4x4"
MACHINE = 8  # GPUs of one machine: what joins machines is not known


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      devices: those that the program is compiled for; of GPUs as many CPU devices.
      chip: None where nothing is published (CPU).
      measured: of this machine.
    """

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None
    measured: Calibration | None = None

    @property
    def kind(self) -> str:
        """Name of the chip in `chips.py`."""
        return self.name.split(":")[1]

    @property
    def shape(self) -> str:
        """Of the slice, or how many."""
        return self.name.split(":")[-1]

    @property
    def rough(self) -> bool:
        """Whether memory is by formula: without a GPU there is no compiler for one."""
        return self.chip is not None and self.chip.gpu

    @property
    def compiles(self) -> bool:
        """Whether compiling tells anything: of a single GPU it would not."""
        return not self.rough or len(self.devices) > 1

    @classmethod
    def parse(cls, text: str) -> Target:
        """`here`, `cpu:N`, `gpu:NAME:N` (or NxNAME) or `tpu:GENERATION:TOPOLOGY`, see `chips.py`.

        Called before any device is used, since it decides how many there are.

        Raises:
          InputError: unknown target, libtpu is not installed, or this machine was not calibrated.
        """
        if short := re.fullmatch(r"(\d+)[xX](\w+)", text):
            text = f"gpu:{short[2].lower()}:{short[1]}"
        match text.split(":"):
            case ["here"]:
                return cls(text, tuple(jax.devices()), None, Calibration.read())
            case ["cpu", count] if count.isdecimal() and int(count):
                return cls(text, _cpus(int(count)), None)
            case ["gpu", name, count] if name in GPUS and count.isdecimal() and int(count):
                if int(count) > MACHINE:
                    raise InputError(
                        f"--dry_run={text}: the links between machines are not known, give at most "
                        f"{MACHINE} GPUs"
                    )
                return cls(text, _cpus(int(count)), GPUS[name])
            case ["tpu", generation, shape] if generation in CHIPS:
                return cls(text, _tpus(generation, shape), CHIPS[generation])
        raise InputError(f"unknown --dry_run={text}: give {EXAMPLES} (GPUs: {', '.join(GPUS)})")


def _cpus(count: int) -> tuple[Any, ...]:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # something has used a device already
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(f"{count} CPU devices are asked for, and {len(devices)} exist already")
    return tuple(devices[:count])


def _tpus(generation: str, shape: str) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("compiling for TPU needs its compiler: pip install 'jax[tpu]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # this machine is no TPU: do not ask it
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling takes no chip from others
    jax.config.update("jax_platforms", "cpu")
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{generation}:{shape}"
        )
    except Exception as e:  # libtpu reports a shape that does not exist in several ways
        reason = str(e).strip().splitlines()[0][:200]
        raise InputError(f"no such slice as {generation}:{shape} ({reason}): {EXAMPLES}") from e
    return tuple(description.devices)
