"""What an experiment runs on a mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ppflow_jax.devices.programs import for_training
from ppflow_jax.devices.sharding import (
    batch_sharding,
    data_shards,
    layout,
    replicated,
    tree_shardings,
)
from ppflow_jax.models.network import Apply, make_apply
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.optimizer import make_optimizer
from ppflow_jax.train.state import TrainState, init_state
from ppflow_jax.train.step import Metrics, compiled, make_train_step


class Program(NamedTuple):
    """What runs on a mesh; `abstract` and `shardings` are trees of the training state."""

    apply: Apply
    optimizer: optax.GradientTransformation
    init: Callable[[jax.Array], TrainState]
    abstract: TrainState
    shardings: TrainState
    step: Callable[..., tuple[TrainState, Metrics]]


def make_program(experiment: Experiment, mesh: Mesh) -> Program:
    """Network, optimizer and jitted training step of `experiment` on `mesh`; allocates nothing.

    Raises:
      InputError: the batch cannot be divided among the devices, or these do not have the
        attention that was chosen.
    """
    config, model = experiment.config, experiment.card.model
    shards = data_shards(mesh) * config.train.accumulate
    experiment.objective.check_batch(config.data.batch_size, shards)
    dtype, remat = jnp.dtype(config.model.dtype), config.model.remat
    attention, head = config.model.attention, model.head_width
    programs = for_training(attention, dtype, remat=remat, head=head, mesh=mesh)
    rules = model.block.rules
    place = layout(mesh, rules)
    apply = make_apply(model, dtype=dtype, remat=remat, programs=programs, layout=place)
    optimizer = make_optimizer(experiment.optim, config.train.steps)
    init = functools.partial(init_state, model, optimizer)
    abstract = jax.eval_shape(init, jax.random.key(0))
    shardings = tree_shardings(abstract, mesh, rules)
    step = compiled(
        make_train_step(
            experiment.objective,
            apply,
            optimizer,
            ema=config.train.ema,
            ema_warmup=config.train.ema_warmup,
            accumulate=config.train.accumulate,
        ),
        programs,
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
    )
    return Program(apply, optimizer, init, abstract, shardings, step)
