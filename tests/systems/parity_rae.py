"""RAE against arrays of the authors' code (bytetriper/RAE), whose time runs from data to noise.

The original ends its grid before data, and draws no raw time within 0.001 of noise; so do these.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from ppflow_jax.flow.times import BASE_NUMBERS, Law, LogitNormal, shifted
from tests.acceptance.comparison import Row
from tests.systems import parity_ddt

if TYPE_CHECKING:
    from tests.systems_parity import Reference

LAST = 0.999


def rows(ref: Reference) -> Iterator[Row]:
    if "shift/m" in ref:
        yield from times(ref)
    yield from parity_ddt.rows(ref)


def times(ref: Reference) -> Iterator[Row]:
    shifts = [float(m / BASE_NUMBERS) ** 0.5 for m in ref["shift/m"]]
    for kind, end in (("ode", LAST), ("sde", 0.96)):
        for points in (5, 50):
            name = f"shift/{kind}_grid_{points}"
            raw = np.linspace(0, end, points)
            ours = [1 - shifted(raw, shift) for shift in shifts]
            yield _row(ref, name, np.float32(ours), ref[name], 2e-6)
    u = jnp.asarray(ref["shift/uniform"])
    for text, theirs in zip(ref["shift/time_dist"], ref["shift/t"]):
        kind, *numbers = str(text).split("_")
        normal = None
        if kind != "uniform":
            mean, std = map(float, numbers)
            normal = LogitNormal(-mean, std)
        for shift, dims, values in zip(shifts, ref["shift/dims"], theirs):
            # u counts from data here and there, up to the raw time that they leave out
            law, low = Law(shift, normal), float(shifted(1 - LAST, shift))
            ours = np.asarray(1 - law.times(u, np.full(len(u), low), np.ones(len(u))))
            name = f"shift/t {text} {dims}"
            far = np.arange(len(u)) != 1  # the original's own error, see its bound
            yield _row(ref, name, ours[far], values[far], 2e-6)
            yield _row(ref, f"{name}, u=1e-6", ours[1], values[1], 1e-3)


def _row(ref: Reference, name: str, ours, theirs, bound: float) -> Row:
    return Row(f"rae {name}", float(np.max(np.abs(np.float64(ours) - theirs))), bound)
