"""Devices to compile for that need not be there."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from ppflow_jax.cost.chips import CHIPS, Chip
from ppflow_jax.errors import InputError

EXAMPLES = "cpu:8, tpu:v5e:4x4, tpu:v5p:8x8x16 or tpu:v6e:16x16"


@dataclass(frozen=True)
class Target:
    """Devices to compile for; `chip` is None where nothing is published (CPU)."""

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None

    @classmethod
    def parse(cls, text: str) -> Target:
        """`cpu:N`, or `tpu:GENERATION:TOPOLOGY` with chips of `chips.CHIPS`.

        Called before any device is used, since it decides how many there are.

        Raises:
          InputError: unknown target, or libtpu is not installed.
        """
        match text.split(":"):
            case ["cpu", count] if count.isdecimal() and int(count):
                return cls(text, _cpus(int(count)), None)
            case ["tpu", generation, shape] if generation in CHIPS:
                return cls(text, _tpus(generation, shape), CHIPS[generation])
        raise InputError(f"unknown --dry_run={text}: give {EXAMPLES}")


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
        raise InputError("compiling for TPU needs its compiler: pip install libtpu")
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
