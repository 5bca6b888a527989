"""Slices: devices with links among them, which the data centre's network connects to others.

JAX numbers those of TPUs, and of GPUs the machines or NVLink domains.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import jax


def slice_of(device: jax.Device) -> int:
    """The slice of a TPU or GPU; other devices are in one."""
    return getattr(device, "slice_index", 0)


def by_slice(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices of every slice, in the order of these."""
    found: dict[int, list[jax.Device]] = defaultdict(list)
    for device in devices:
        found[slice_of(device)].append(device)
    return [found[index] for index in sorted(found)]


def may_cross(device: jax.Device) -> bool:
    """Whether weights may be split over slices: GPUs do so over the network between machines."""
    return device.platform == "gpu"


def near(devices: Sequence[jax.Device]) -> int:
    """How many of the devices talk fast: those of a TPU slice, or of a process elsewhere."""
    groups: dict[int, int] = defaultdict(int)
    for device in devices:
        groups[slice_of(device) if device.platform == "tpu" else device.process_index] += 1
    return min(groups.values())
