"""Memory of the CPU backend."""

from __future__ import annotations

import ctypes

import jax

# Parameters of glibc's mallopt
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_scratch() -> None:
    """On CPU, have the allocator keep what programs give back. Call it before the first array.

    A program takes its scratch memory again in every call. By default the system takes back, maps
    and zeroes all of it every time, which is a third of the time of a small training step. Kept,
    the process may grow by a few times that memory in its first calls, until later ones fit what is
    there. Only with glibc, and only for what the calling thread allocates, which is why programs
    then run in it.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if jax.default_backend() == "cpu" and mallopt:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
