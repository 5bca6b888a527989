"""MMD against arrays of the authors' code (diegovalsesia/MMD-DDM); the file has others' too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from ppflow_jax.systems.mmd import kernel, mmd2
from tests.acceptance.comparison import Row

if TYPE_CHECKING:
    from tests.systems_parity import Reference

CASES = {"poly1": ("poly", 1), "poly3": ("poly", 3), "rbf": ("rbf", 1)}


def rows(ref: Reference) -> Iterator[Row]:
    x, y = (jnp.float32(ref[f"mmd/{name}"]) for name in "xy")
    for name, setting in CASES.items():
        value, gradient = jax.value_and_grad(mmd2)(x, y, *setting)
        yield from ref.row(f"mmd/{name}/mmd2", value)
        yield from ref.row(f"mmd/{name}/grad_x", gradient)
        yield from ref.row(f"mmd/{name}/kernel_xy", kernel(*setting, x, y))
