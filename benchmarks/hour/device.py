"""The device, what its maker says of it, and times on it."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ppflow_jax.cost.chips import CHIPS
from ppflow_jax.cost.measure import Ceiling

# Dense bfloat16 FLOP/s with float32 sums, by words of `device_kind`; the first that fits counts.
# NVIDIA's data sheets (half of what they state "with sparsity"); TPUs as in `cost.chips`.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v6": CHIPS["v6e"].flops,
}
LIBRARIES = ("jax", "jaxlib", "flax", "torch", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")


def describe(device: jax.Device) -> dict[str, Any]:
    """What device.json says."""
    stats = device.memory_stats() or {}
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": jax.device_count(),
        "memory": stats.get("bytes_limit"),
        "peak": peak(device.device_kind),
        "python": platform.python_version(),
        "libraries": {name: v for name in LIBRARIES if (v := _version(name))},
    }


def peak(kind: str) -> float | None:
    """FLOP/s in bfloat16 that the maker states, if it is known here."""
    words = f" {kind.replace('-', ' ').lower()} "
    return next((flops for name, flops in PEAKS.items() if f" {name.lower()} " in words), None)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def ceiling(tiny: bool) -> Ceiling:
    """Plain matrix products in bfloat16."""
    return Ceiling(jnp.bfloat16, *((256, 2) if tiny else ()))


def timed(
    calls: dict[str, Callable[[], Any]], seconds: float, least: int = 3, most: int = 15
) -> dict[str, list[float]]:
    """Seconds of every call in interleaved rounds, at least `least`, until `seconds` are over.

    A call returns arrays, which are waited for. Each runs once before.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    found: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start > seconds:
            break
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            found[name].append(time.perf_counter() - begin)
    return found


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds."""
    return statistics.median(a / b for a, b in zip(slow, fast))


def quartiles(seconds: list[float]) -> list[float]:
    low, _, high = statistics.quantiles(seconds, n=4)
    return [low, high]


def peak_bytes() -> int | None:
    """Most that was in use at once in this process so far; no CPU knows it."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
