"""Experts on different devices: each has room for so many tokens, and tokens travel.

Every device fills, for every expert, a fixed number of slots with tokens of its own images, first
choices before second ones, and sends them to the expert's device (GShard, arXiv 2006.16668). So
all shapes are static. A token that finds no slot does not pass that expert: it is dropped, and
counted. Where a device has as many slots as tokens, none is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from ppflow_jax.devices.exchange import EXPERT, Way
from ppflow_jax.devices.sharding import data_shards
from ppflow_jax.errors import InputError
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.parts import BlockSpec
from ppflow_jax.systems.experts import Weights, hidden, picked, summed


def slots(tokens: int, experts: int, top_k: int, capacity: float) -> int:
    """Of one device for one expert: `capacity` times the mean, and no more than it has tokens."""
    return math.ceil(min(tokens, capacity * tokens * top_k / experts))


def travelling(
    weights: Weights,
    x: Float[Array, "t d"],
    gate: Float[Array, "t k"],
    expert: Int[Array, "t k"],
    count: int,
    way: Way,
) -> tuple[Float[Array, "t d"], Float[Array, "t k"]]:
    """sum_k kept_k gate_k E_{expert_k}(x), in float32, and what is kept: 1, or 0 if dropped.

    Args:
      weights: see `experts.mixture`; of the experts of this device.
      count: all experts.
      way: to the devices of the others.
    """
    (tokens, top_k), pairs = gate.shape, expert.T.reshape(-1)  # first choices first
    room = slots(tokens, count, top_k, way.capacity)
    sizes = jnp.bincount(pairs, length=count)
    order = jnp.argsort(pairs)
    rank = jnp.zeros_like(pairs).at[order].set(jnp.arange(pairs.size), unique_indices=True)
    turn = rank - (jnp.cumsum(sizes) - sizes)[pairs]
    kept = turn < room
    nowhere = count * room + jnp.arange(pairs.size)
    place = jnp.where(kept, pairs * room + turn, nowhere)
    source = pairs.size + jnp.arange(count * room)  # nothing
    source = source.at[place].set(jnp.arange(pairs.size), mode="drop", unique_indices=True)
    filled = picked(jnp.tile(x, (top_k, 1)), source).reshape(count, room, -1)
    here = way.there(filled)

    def product(rows: Array) -> Callable[[Array], Array]:
        return lambda w: jnp.einsum("erd,edf->erf", rows, w)

    bias = weights["up_bias"][:, None] if "up_bias" in weights else None
    y = product(hidden(weights, product(here), bias))(weights["down"])
    by_token = lambda pairs: pairs.reshape(top_k, tokens).T
    y = picked(way.back(y).reshape(count * room, -1), by_token(place).reshape(-1))
    return summed(y, gate), by_token(kept).astype(jnp.float32)


def check_mesh(mesh: Mesh, block: BlockSpec, capacity: float) -> None:
    """
    Raises:
      InputError: a mesh with an axis for experts that these blocks cannot be on.
    """
    if EXPERT not in mesh.shape:
        return
    parts = mesh.shape[EXPERT]
    experts = getattr(block.ffn, "experts", 0) if block.ffn.kind == "moe" else 0
    if not experts:
        raise InputError(
            f"config.mesh.expert={parts}: the blocks have no ffn=moe but {block.ffn}: "
            "leave it out, or set config.model.ffn=moe:experts=..."
        )
    if experts % parts:
        raise InputError(
            f"config.mesh.expert={parts} does not divide the {experts} experts of "
            f"config.model.ffn={block.ffn}: choose a divisor"
        )
    if not 0 < capacity < math.inf:
        raise InputError(
            f"config.mesh.capacity={capacity}: give a number above 0, such as 2, twice the mean; "
            f"with {experts / block.ffn.top_k:g} no token is dropped"
        )


def padding_flops(
    model: ModelConfig, mesh: Mesh, config: ConfigDict, pattern: tuple[int, ...]
) -> int:
    """FLOPs that a training step has more, or less, because slots are computed and not pairs.

    Args:
      config: of the experiment.
      pattern: stages of the images, see `flow.terms.Objective`.
    """
    if EXPERT not in mesh.shape:
        return 0
    ffn, total, parts = model.block.ffn, 0, config.train.accumulate
    patterns = config.data.batch_size // (parts * data_shards(mesh) * len(pattern))
    pair = 2 * ffn.products * model.width * int(model.mlp_ratio * model.width)
    for stage in set(pattern):
        rows, cols = model.pyramid.grid(stage, model.latent_size)
        tokens = patterns * pattern.count(stage) * rows * cols  # of a device
        room = ffn.experts * slots(tokens, ffn.experts, ffn.top_k, config.mesh.capacity)
        total += room - tokens * ffn.top_k
    return 3 * parts * model.depth * data_shards(mesh) * pair * total
