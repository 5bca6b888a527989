"""How much the hidden units of a trained model's MLPs matter for its loss."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from ppflow_jax.checkpoints.card import Card
from ppflow_jax.console import progress
from ppflow_jax.data.pipeline import Stream
from ppflow_jax.devices.sharding import batch_sharding, data_shards, local_mesh, to_global
from ppflow_jax.errors import InputError, stream_seed
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Params, make_apply
from ppflow_jax.models.parts import Mlp
from ppflow_jax.systems.dense2moe import importance
from ppflow_jax.train.inputs import make_inputs, open_inputs


def check_measurable(model: ModelConfig) -> None:
    """
    Raises:
      InputError: blocks without an MLP, adapters, or conditions.
    """
    if model.block.ffn != Mlp() or model.adapters:
        adapters = ": merge its adapters first" if model.adapters else ""
        raise InputError(f"units of an MLP are ranked, and the model has {model.block}{adapters}")
    if model.asked:
        names = ", ".join(condition.name for condition in model.asked)
        raise InputError(f"the model's conditions are {names}, and rank has no values for them")


def unit_importance(
    card: Card, params: Params, data: ConfigDict, batches: int, batch_size: int, seed: int = 0
) -> Float[np.ndarray, "l h"]:
    """The mean over batches of `dense2moe.importance`, for the flow's loss over all stages.

    Args:
      params: float32, on the devices of this process.
      data: of a configuration, what the model was trained on.

    Raises:
      InputError: see `check_measurable`; data that cannot be used, or a batch that cannot be
        divided among devices and stages.
    """
    model, mesh = card.model, local_mesh()
    check_measurable(model)
    data = ConfigDict({"stage": "", **data.to_dict(), "fields": (), "task": "none"})
    objective = FlowObjective(model.pyramid, card.flow, model.null_label)
    objective.check_batch(batch_size, data_shards(mesh))
    source, encoder, _ = open_inputs(data, card)
    place, apply = batch_sharding(mesh), make_apply(model)
    see, names = make_inputs(encoder, mesh, seed), ("fc1", "fc2")

    @functools.partial(jax.jit, donate_argnums=0)
    def added(total, params, batch, key):
        draws = objective.draw(key, batch)

        def loss(units):
            whole = params | {"blocks": params["blocks"] | units}
            return objective.loss(apply, whole, {}, {"x": batch["x"]}, draws, {})[0]

        units = {name: params["blocks"][name] for name in names}
        return total + importance(units, jax.grad(loss)(units)) / batches

    stream = Stream(source, batch_size, seed, model.num_classes, flip=data.flip)
    key = jax.random.key(stream_seed(seed, 1))
    total = jnp.zeros((model.depth, int(model.mlp_ratio * model.width)))
    with progress(batches * batch_size, 0, "img", "rank") as bar:
        for step, batch in zip(range(batches), stream.batches()):
            seen = see(to_global(batch, place, batch_size), step)
            seen = {name: seen[name] for name in ("x", "label")}
            total = added(total, params, seen, jax.random.fold_in(key, step))
            bar.update(batch_size)
    return np.asarray(total)
