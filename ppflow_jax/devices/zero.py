"""Weights that are gathered all at once and stay whole, instead of block by block.

The stages of ZeRO (arXiv 1910.02054) say what `fsdp` splits. With 3 it is all that a device keeps,
and a block is gathered whenever it is its turn (`sharding.layout`). With 2 the network is gathered
once a step, in the dtype of its matrix products; gradients, float32 weights, moments and EMA stay
split, as with 3. A checkpoint knows nothing of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from ppflow_jax.devices.sharding import Rules, leaf_path, stacked, tree_shardings, without_fsdp
from ppflow_jax.errors import InputError

STAGES = (2, 3)
SAMPLING = 0.25  # of a device's memory that a copy of the weights may take for sampling


def check_stage(stage: int) -> None:
    """
    Raises:
      InputError: no stage that there is.
    """
    if stage not in STAGES:
        raise InputError(
            f"config.mesh.zero={stage}: give 3, weights gathered block by block, or 2, once a step "
            "(1 would hold more than 2, and send as much)"
        )


def bytes_on_device(tree: Any, places: Any) -> int:
    """Of the leaves of `tree` that each device holds with the shardings `places`."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(places))
    return sum(math.prod(p.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, p in pairs)


@dataclass(frozen=True)
class Whole:
    """Gathers weights that are split over `fsdp`; what `tensor` splits stays so.

    Attributes:
      mesh: of the weights.
      rules: those of the model's own parts.
      dtype: of the matrix products: the blocks are gathered, and stay, in it, since it is all that
        they enter (`models.stack`). Others keep theirs.
    """

    mesh: Mesh
    rules: Rules
    dtype: DTypeLike

    def places(self, tree: Any) -> Any:
        """The sharding of every leaf of `tree`, parameters of a network, when gathered."""

        def one(stored: NamedSharding) -> NamedSharding:
            return NamedSharding(self.mesh, P(*map(without_fsdp, stored.spec)))

        return jax.tree.map(one, tree_shardings(tree, self.mesh, self.rules))

    def __call__(self, tree: Any) -> Any:
        """`tree` of split leaves, gathered."""

        def one(path, leaf, stored, here):
            if stored.spec == here.spec:
                return leaf
            if stacked(leaf_path(path)):
                leaf = leaf.astype(jnp.dtype(self.dtype))
            # Said twice, so that the cast comes before the gather.
            leaf = jax.lax.with_sharding_constraint(leaf, stored)
            return jax.lax.with_sharding_constraint(leaf, here)

        stored = tree_shardings(tree, self.mesh, self.rules)
        return jax.tree_util.tree_map_with_path(one, tree, stored, self.places(tree))

    def back(self, gradients: Any) -> Any:
        """Gradients of gathered weights, split as these are stored, float32."""

        def one(gradient, stored):
            return jax.lax.with_sharding_constraint(gradient, stored).astype(jnp.float32)

        return jax.tree.map(one, gradients, tree_shardings(gradients, self.mesh, self.rules))

    def bytes(self, params: Any) -> int:
        """What the gathered copies take on a device; leaves that are whole anyway have none."""
        stored = tree_shardings(params, self.mesh, self.rules)
        made, places = jax.eval_shape(self, params), self.places(params)
        split = jax.tree.map(lambda a, b: a.spec != b.spec, stored, places)
        sizes = jax.tree.map(bytes_on_device, made, places)
        return sum(size for size, cut in zip(*map(jax.tree.leaves, (sizes, split))) if cut)

    def fits_beside(self, params: Any, memory: float | None) -> bool:
        """Whether a sampler may hold `params` gathered, on devices of so many bytes.

        It may for a quarter of them: a training state split over two devices or more then leaves
        another quarter. Where the memory is not known, it may.
        """
        return memory is None or self.bytes(params) <= SAMPLING * memory
