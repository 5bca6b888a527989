"""The parts of the hour, in their order."""

from __future__ import annotations

# Shares of the time, and functions
PARTS = {
    "parity": (60, "benchmarks.hour.parity:run"),
    "attention": (55, "benchmarks.hour.attention:run"),
    "speed": (180, "benchmarks.hour.speed:run"),
    "peer": (105, "benchmarks.hour.peer:run"),
    "accelerate": (55, "benchmarks.hour.accelerate:run"),
    "plans": (60, "benchmarks.hour.plans:run"),
    "training": (65, "benchmarks.hour.training:run"),
}
