"""Why a collective is in a compiled program."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import Mesh

from ppflow_jax.cost.collectives import Collective
from ppflow_jax.devices.exchange import EXPERT
from ppflow_jax.devices.sharding import is_stacked, leaf_path
from ppflow_jax.train.optimizer import MUON
from ppflow_jax.train.program import Program
from ppflow_jax.train.state import whole


def cause(c: Collective, mesh: Mesh, weights: frozenset[int]) -> str:
    """Why a collective is there (none is `unexplained`); `weights`: sizes gathered before use."""
    coordinates = np.unravel_index(np.asarray(c.group), tuple(mesh.shape.values()))
    axes = {name for name, where in zip(mesh.shape, coordinates) if len(set(where.tolist())) > 1}
    where = " (blocks)" if c.times > 1 else " (others)"
    if "tensor" in axes:
        return "tensor parallelism"
    if f"/{MUON}/" in c.op_name:
        return "matrices of Muon"
    if EXPERT in axes and c.kind == "all-to-all":
        return "tokens to their experts"
    if c.kind == "all-gather" and weights.issuperset(c.elements):
        return "weights gathered" + where
    if c.size <= 4096:
        return "scalars and labels"
    # XLA names neither its own reduce-scatters nor the moves that take padded shards to their place
    backward = "transpose(" in c.op_name or not c.op_name
    if backward and c.kind in ("all-reduce", "reduce-scatter"):
        return "gradients summed" + where
    if backward and c.kind == "collective-permute" and c.size <= 4 * max(weights, default=0):
        return "gradients to their shards" + where
    return f"unexplained: {c.op_name}"


def gathered_sizes(program: Program, mesh: Mesh) -> frozenset[int]:
    """Elements of every weight that is split, when gathered: one block, or all.

    Over `fsdp`, and over `expert` too where tokens do not go to their experts.
    """
    sizes, leaves = set(), jax.tree_util.tree_leaves_with_path(program.parameters)
    places = whole(program.shardings["params"], program.frozen_shardings)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(places)):
        here = math.prod(sharding.shard_shape(leaf.shape))
        for axis in ("fsdp", EXPERT):
            if any(axis in (axes or ()) for axes in sharding.spec):
                here *= mesh.shape[axis]
                sizes.add(here)
                if is_stacked(leaf_path(path)):
                    sizes.add(here // leaf.shape[0])
    return frozenset(sizes)
