"""The axis `expert` of a mesh: tokens go to the devices of their experts, and come back.

For all else it is an axis of data. A mesh has it only where it has more than one device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ppflow_jax.devices.layout import Exchanged, PerRows

EXPERT = "expert"


@dataclass(frozen=True)
class Way:
    """How the devices along `expert` give each other tokens.

    Attributes:
      capacity: tokens that a device may send to an expert, over the mean.
      axis: of the mesh; None: all experts are here.
    """

    capacity: float
    axis: str | None = None

    def there(self, rows: Float[Array, "e c d"]) -> Float[Array, "_ _ d"]:
        """Of n devices: to each the rows of its e / n experts, [e / n, n c, d]."""
        if self.axis is None:
            return rows
        return jax.lax.all_to_all(rows, self.axis, split_axis=0, concat_axis=1, tiled=True)

    def back(self, rows: Float[Array, "_ _ d"]) -> Float[Array, "e c d"]:
        """The way back of `there`."""
        if self.axis is None:
            return rows
        return jax.lax.all_to_all(rows, self.axis, split_axis=1, concat_axis=0, tiled=True)


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes over which a batch is split."""
    return ("data", "fsdp", EXPERT) if EXPERT in mesh.shape else ("data", "fsdp")


def known(spec: P, mesh: Mesh) -> P:
    """`spec` on a mesh that may not have the axis."""
    return spec if EXPERT in mesh.shape else _without_expert(spec)


def _without_expert(spec: P) -> P:
    return P(*(None if axis == EXPERT else axis for axis in spec))


def expert_programs(
    mesh: Mesh, rows: P, specs: Callable[[Any, str], Any], capacity: float | None
) -> tuple[PerRows, Exchanged | None]:
    """`experts` and `exchanged` of a `Layout`; the second only with the axis and a `capacity`.

    Args:
      rows: how batches are split.
      specs: (weights, prefix of their paths) -> how they are split, but for `fsdp`.
    """

    def divides(arrays: Any) -> bool:  # else it is one image at a time, under vmap
        parts = functools.reduce(lambda n, axis: n * mesh.shape[axis], batch_axes(mesh), 1)
        return arrays[0].shape[0] % parts == 0

    def experts(f, arrays, weights, prefix):
        if not divides(arrays):
            return f(arrays, weights)
        return _on_rows(mesh, rows, f, jax.tree.map(_without_expert, specs(weights, prefix)))(
            arrays, weights
        )

    def exchanged(f, arrays, weights, prefix):
        if not divides(arrays):
            return f(arrays, weights, Way(float("inf")))
        here = functools.partial(f, way=Way(capacity, EXPERT))
        return _on_rows(mesh, rows, here, specs(weights, prefix))(arrays, weights)

    return experts, exchanged if capacity and EXPERT in mesh.shape else None


def _on_rows(
    mesh: Mesh, rows: P, f: Callable[[Any, Any], Any], specs: Any
) -> Callable[[Any, Any], Any]:
    """f(rows, weights) on every device's rows, with its part of the weights.

    Where `tensor` splits these, the first result is the sum over it.
    """
    split = any("tensor" in spec for spec in jax.tree.leaves(specs))

    def here(arrays, weights):
        found = f(arrays, weights)
        if not split:
            return found
        if isinstance(found, tuple):
            return jax.lax.psum(found[0], "tensor"), *found[1:]
        return jax.lax.psum(found, "tensor")

    return jax.shard_map(here, mesh=mesh, in_specs=(rows, specs), out_specs=rows, check_vma=False)
