"""How much memory a device has."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all


def device_memory() -> float | None:
    """Bytes that JAX may use of a device of this machine; None for CPUs, and where it says nothing.

    All processes call this at once and get the same: what they choose by it must be one thing.
    """
    stats = jax.local_devices()[0].memory_stats()
    if not stats:
        return None
    found = np.float32(stats.get("bytes_limit", 0))
    return float(broadcast_one_to_all(found) if jax.process_count() > 1 else found) or None
