"""The device mesh, and where every array lives on it."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int

from ppflow_jax.devices.exchange import EXPERT, batch_axes, expert_programs, known
from ppflow_jax.devices.layout import Attend, Layout
from ppflow_jax.devices.slices import by_slice, may_cross
from ppflow_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
WITH_EXPERTS = ("data", "fsdp", EXPERT, "tensor")

# Pattern of the paths of leaves, and the axes of the mesh that theirs are split over
Rules = tuple[tuple[str, P], ...]
# Of the blocks of DiT and what is around them; other parts bring their own (`models.parts`).
# By the path of a leaf; the optimizer's moments and the EMA have the same paths below their own
# prefix, and what matches nothing is on every device. Of several matches the first that divides
# the leaf wins. The leading axis of the blocks is depth. Over 16 devices the width of XL, 1152,
# leaves shards of 72, which TPUs pad; heads and hidden units divide better.
RULES: Rules = (
    (r"blocks/attention/qkv_kernel$", P(None, None, None, ("tensor", "fsdp"))),
    (r"blocks/attention/qkv_kernel$", P(None, "fsdp", None, "tensor")),
    (r"blocks/attention/qkv_bias$", P(None, None, "tensor")),
    (r"blocks/attention/out/kernel$", P(None, "tensor", "fsdp")),
    (r"blocks/fc1/kernel$", P(None, None, ("tensor", "fsdp"))),
    (r"blocks/fc1/bias$", P(None, "tensor")),
    (r"blocks/fc2/kernel$", P(None, ("tensor", "fsdp"))),
    (r"blocks/adaln/kernel$", P(None, None, "fsdp")),
    (r"(final_adaln|time/fc[12])/kernel$", P(None, "fsdp")),
    (r"terms/.*kernel$", P(None, "fsdp")),
    (r"residual/kernel$", P(None, None, "fsdp")),  # see `models.students`
    # Adapters are small: they are cut only where they meet what `tensor` has cut.
    (r"blocks/attention/qkv_lora_b$", P(None, None, None, "tensor")),
    (r"blocks/attention/qkv_(gamma|beta)$", P(None, None, "tensor")),
    (r"blocks/fc1/lora_b$", P(None, None, "tensor")),
    (r"blocks/fc1/(gamma|beta)$", P(None, "tensor")),
    (r"blocks/(attention/out|fc2)/lora_a$", P(None, "tensor")),
)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    expert: int = 1,
) -> Mesh:
    """Mesh of all devices, or of those given; one size of -1 takes what is left.

    The last axes talk most and get the nearest devices; `expert` is one only if it is not 1. Of
    several slices each is a part of `data`: between them only gradients are summed. Of GPUs the
    other axes may be wider than a machine.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or slices cannot be cut so.
    """
    devices = jax.devices() if devices is None else devices
    axes = AXES if expert == 1 else WITH_EXPERTS
    given = dict(data=data, fsdp=fsdp, expert=expert, tensor=tensor)
    sizes, count = [given[axis] for axis in axes], len(devices)
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise InputError(f"mesh sizes {sizes} must be positive, with at most one -1")
    product = int(np.prod([s for s in sizes if s != -1]))
    if -1 in sizes and count % product == 0:
        sizes[sizes.index(-1)] = count // product
    if np.prod(sizes) != count:
        raise InputError(
            f"mesh {_named(axes, [given[axis] for axis in axes])} does not cover the {count} "
            "device(s): the sizes must multiply to that number (-1: whatever is left)"
        )
    if len(axes) > len(AXES) and sizes[2] == 1:  # expert=-1, and nothing is left
        axes, sizes = AXES, [*sizes[:2], sizes[3]]
    slices, types = by_slice(devices), (AxisType.Auto,) * len(axes)
    if sizes[0] % len(slices) or len({*map(len, slices)}) > 1:
        if may_cross(devices[0]):
            return Mesh(np.concatenate(slices).reshape(sizes), axes, axis_types=types)
        raise InputError(
            f"mesh {_named(axes, sizes)} on {len(slices)} slices of "
            f"{', '.join(str(len(each)) for each in slices)} devices: data must be a multiple of "
            f"their number, so that {' and '.join(axes[1:])} stay within one"
        )
    part = (sizes[0] // len(slices), *sizes[1:])
    meshes = [jax.make_mesh(part, axes, axis_types=types, devices=each) for each in slices]
    if len(meshes) == 1:
        return meshes[0]
    return Mesh(np.concatenate([mesh.devices for mesh in meshes]), axes, axis_types=types)


def _named(axes: Sequence[str], sizes: Sequence[int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in zip(axes, sizes))


def local_mesh() -> Mesh:
    """Mesh of the devices of this process alone, all along `data`."""
    devices = np.array(jax.local_devices()).reshape(-1, 1, 1)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)


def data_shards(mesh: Mesh) -> int:
    """Parts into which a batch is cut: those of its axes."""
    return math.prod(mesh.shape[axis] for axis in batch_axes(mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over data and fsdp, and over expert where there is one."""
    return NamedSharding(mesh, P(batch_axes(mesh)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def leaf_path(path) -> str:
    """Path of a leaf as `params/blocks/fc1/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_stacked(path: str) -> bool:
    """Whether a leaf of a network is of a stack of blocks, and has a leading axis of depth."""
    return path.partition("/")[0].endswith("blocks")


def _parts(axis: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    names = (axis,) if isinstance(axis, str) else axis or ()
    return math.prod(mesh.shape[name] for name in names)


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> P:
    """By the rules; if none divides the leaf, the last that matches, as far as it does."""
    specs = [
        known(s, mesh)
        for pattern, s in (*RULES, *rules)
        if re.search(pattern, path) and len(s) <= len(shape)
    ]
    divided = [
        P(*(axis if size % _parts(axis, mesh) == 0 else None for axis, size in zip(spec, shape)))
        for spec in specs
    ]
    return next((new for new, spec in zip(divided, specs) if new == spec), (divided or [P()])[-1])


def tree_shardings(tree: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """Sharding of every leaf by `RULES` and `rules`; an axis that does not divide is not split."""

    def one(path, leaf) -> NamedSharding:
        return NamedSharding(mesh, _spec(leaf_path(path), leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(one, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(leaf: jax.Array, here: NamedSharding, stored: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(leaf, here)


def _gather_fwd(leaf, here, stored):
    return _gather(leaf, here, stored), None


def _gather_bwd(here, stored, _, gradient):
    # Left alone, the compiler sums the gradient into a whole copy on every device.
    return (jax.lax.with_sharding_constraint(gradient, stored),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def without_fsdp(axis: str | tuple[str, ...] | None) -> str | None:
    """An axis of a leaf's sharding as it is when the leaf is gathered."""
    return "tensor" if isinstance(axis, tuple) else None if axis == "fsdp" else axis


def layout(mesh: Mesh, rules: Rules = (), capacity: float | None = None) -> Layout:
    """Fully sharded data parallelism (ZeRO stage 3, arXiv 1910.02054) for the network.

    Weights are gathered over `fsdp` just before use, one block at a time, and their gradients
    are summed and scattered back at once; activations stay split over the batch. Without it the
    compiler moves activations to the weights. `rules` are those of the model's own parts. What
    `expert` splits is gathered like that as well; or, with a `capacity` (see `exchange.Way`),
    tokens go to their experts.
    """
    place = batch_sharding(mesh)

    def batch(x: jax.Array) -> jax.Array:
        if x.shape[0] % data_shards(mesh):  # one image at a time, under vmap
            return x
        return jax.lax.with_sharding_constraint(x, place)

    def weights(tree: Any, prefix: str) -> Any:
        def one(path, leaf):
            name = prefix + leaf_path(path).removesuffix("/value")
            if prefix:  # one block: without the axis of depth
                stored = P(*_spec(name, (1, *leaf.shape), mesh, rules)[1:])
            else:
                stored = _spec(name, leaf.shape, mesh, rules)
            here = P(*(without_fsdp(axis) for axis in stored))
            return _gather(leaf, NamedSharding(mesh, here), NamedSharding(mesh, stored))

        return jax.tree_util.tree_map_with_path(one, tree)

    def heads(kernel: Attend, otherwise: Attend) -> Attend:
        split = P(batch_axes(mesh), None, "tensor")

        def run(q, k, v):
            if q.shape[0] % data_shards(mesh) or q.shape[2] % mesh.shape["tensor"]:
                return otherwise(q, k, v)
            local = jax.shard_map(
                kernel, mesh=mesh, in_specs=split, out_specs=split, check_vma=False
            )
            return local(q, k, v)

        return run

    def specs(tree, prefix):
        def spec(path, leaf):
            stored = _spec(prefix + leaf_path(path), (1, *leaf.shape), mesh, rules)[1:]
            return P(*map(without_fsdp, stored))

        return jax.tree_util.tree_map_with_path(spec, tree)

    return Layout(batch, weights, heads, *expert_programs(mesh, place.spec, specs, capacity))


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


def spread(tree: Any, sharding: NamedSharding) -> Any:
    """Global arrays from host arrays that every process holds whole."""
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree
    )


def fetch(x: jax.Array) -> np.ndarray:
    """The whole of a global array, on every process."""
    return np.asarray(x if x.is_fully_addressable else process_allgather(x, tiled=True))
