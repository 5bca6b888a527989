"""The device mesh, and where every array lives on it."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from ppflow_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")

# First match on the path of a leaf wins; the optimizer's moments and the EMA have the same paths
# below their own prefix. The leading axis of the blocks is depth.
RULES: tuple[tuple[str, P], ...] = (
    (r"blocks/attention/qkv_kernel$", P(None, "fsdp", None, "tensor")),
    (r"blocks/attention/qkv_bias$", P(None, None, "tensor")),
    (r"blocks/attention/out/kernel$", P(None, "tensor", "fsdp")),
    (r"blocks/fc1/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/fc1/bias$", P(None, "tensor")),
    (r"blocks/fc2/kernel$", P(None, "tensor", "fsdp")),
    (r"blocks/adaln/kernel$", P(None, None, "fsdp")),
    (r"label/embedding$", P(None, "fsdp")),
    (r"(final_adaln|time/fc[12])/kernel$", P(None, "fsdp")),
    (r".*", P()),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Mesh of all devices with axes `data`, `fsdp`, `tensor`; one -1 takes what is left.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    sizes, count = [data, fsdp, tensor], jax.device_count()
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise InputError(f"mesh sizes {sizes} must be positive, with at most one -1")
    known = int(np.prod([s for s in sizes if s != -1]))
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if np.prod(sizes) != count:
        raise InputError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not cover the {count} device(s): "
            "the sizes must multiply to that number (-1: whatever is left)"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def local_mesh() -> Mesh:
    """Mesh of the devices of this process alone, all along `data`."""
    devices = np.array(jax.local_devices()).reshape(-1, 1, 1)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def data_shards(mesh: Mesh) -> int:
    """Parts into which a batch is cut: the data and fsdp axes."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over data and fsdp."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def leaf_path(path) -> str:
    """Path of a leaf as `params/blocks/fc1/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Sharding of every leaf by `RULES`; an axis that does not divide is not split."""

    def one(path, leaf):
        spec = next(spec for pattern, spec in RULES if re.search(pattern, leaf_path(path)))
        if len(spec) > len(leaf.shape):
            spec = P()
        parts = [
            axis if axis is None or size % mesh.shape[axis] == 0 else None
            for axis, size in zip(spec, leaf.shape)
        ]
        return NamedSharding(mesh, P(*parts))

    return jax.tree_util.tree_map_with_path(one, tree)


@functools.cache
def local_rows(sharding: NamedSharding, batch_size: int) -> Int[np.ndarray, " b"]:
    """Rows of a global batch that the devices of this process hold, increasing.

    Not always one block: on TPU the mesh follows the wires, not the hosts.
    """
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[s] for (s,) in slices]))


def to_global(batch: Any, sharding: NamedSharding, batch_size: int) -> Any:
    """Global arrays of `batch_size` rows from this process's `local_rows` of them."""
    rows = local_rows(sharding, batch_size)

    def one(x: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(batch_size)
            start = int(np.searchsorted(rows, first))
            return x[start : start + last - first]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, shard)

    return jax.tree.map(one, batch)
