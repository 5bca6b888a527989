"""What an experiment runs on a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from ppflow_jax.devices.exchange import EXPERT
from ppflow_jax.devices.programs import for_training
from ppflow_jax.devices.sharding import (
    batch_sharding,
    data_shards,
    layout,
    replicated,
    tree_shardings,
)
from ppflow_jax.devices.zero import Whole, check_stage
from ppflow_jax.flow.terms import Batch, Metrics, Phase
from ppflow_jax.models.network import Apply, Params, abstract_params, make_apply
from ppflow_jax.models.trees import split
from ppflow_jax.systems.capacity import check_mesh
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.optimizer import make_optimizer
from ppflow_jax.train.state import TrainState, extended, init_state, whole
from ppflow_jax.train.step import compiled, make_train_step


class PhaseStep(NamedTuple):
    """The compiled training step of a phase.

    Attributes:
      until: the number of steps after which the phase is over; of the last one without meaning.
      fields: what it needs of a batch besides `x` and `label`.
      run: `(state, batch, key, frozen) -> (state, metrics)`.
    """

    until: int
    fields: tuple[str, ...]
    run: Callable[..., tuple[TrainState, Metrics]]

    def __call__(self, state: TrainState, batch: Batch, key: jax.Array, frozen: Any):
        """A step, which is given no more of the batch than it needs."""
        seen = {name: batch[name] for name in ("x", "label", *self.fields)}
        return self.run(state, seen, key, frozen)


class Program(NamedTuple):
    """What runs on a mesh.

    `abstract` and `shardings` are trees of the training state, `frozen` and `frozen_shardings` of
    what is given to a step and not trained: `base`, the network's other leaves, if there are any,
    and what the objective needs. `apply` is for samplers: it drops no token
    (see `systems.capacity`). `gather` makes the network's leaves those that a sampler is given: it
    would gather them for every evaluation. None: they are whole, or do not fit.
    """

    apply: Apply
    optimizer: optax.GradientTransformation
    init: Callable[[jax.Array], TrainState]
    abstract: TrainState
    shardings: TrainState
    frozen: dict[str, Any]
    frozen_shardings: dict[str, Any]
    steps: tuple[PhaseStep, ...]
    gather: Whole | None = None

    @property
    def parameters(self) -> Params:
        """All abstract leaves of the network and the terms, trained or not."""
        return whole(self.abstract["params"], self.frozen)

    def step(self, done: int) -> PhaseStep:
        """That after `done` steps."""
        return next((s for s in self.steps if done < s.until), self.steps[-1])


def make_program(experiment: Experiment, mesh: Mesh, memory: float | None = None) -> Program:
    """Network, optimizer and jitted training steps of `experiment` on `mesh`; allocates nothing.

    Args:
      memory: bytes of a device; None if not known.

    Raises:
      InputError: the batch cannot be divided among the devices, or these do not have the
        attention that was chosen.
    """
    config, model = experiment.config, experiment.card.model
    objective = experiment.objective
    shards = data_shards(mesh) * config.train.accumulate
    objective.check_batch(config.data.batch_size, shards)
    dtype, remat = jnp.dtype(config.model.dtype), config.model.remat
    attention, head = config.model.attention, model.head_width
    programs = for_training(
        attention, dtype, remat=remat, head=head, mesh=mesh, forward_mode=objective.forward_mode
    )
    rules = model.rules
    check_mesh(mesh, model.block, capacity := config.mesh.get("capacity", 2.0))
    options = dict(dtype=dtype, remat=remat, programs=programs)
    apply = sampled = make_apply(model, layout=layout(mesh, rules), **options)
    if EXPERT in mesh.shape:
        apply = make_apply(model, layout=layout(mesh, rules, capacity), **options)
    told = (config.train.steps, model.matrices, model.undecayed)
    optimizer = make_optimizer(experiment.optim, *told)
    trainable = experiment.trainable

    def init(key: jax.Array) -> TrainState:
        return extended(init_state(model, optimizer, key, objective, trainable), config.train)

    abstract = jax.eval_shape(init, jax.random.key(0))
    shardings = tree_shardings(abstract, mesh, rules)
    frozen = {"base": base} if (base := split(abstract_params(model), trainable)[1]) else {}
    frozen |= {name: abstract_params(model) for name in objective.frozen}
    places = tree_shardings(frozen, mesh, rules)
    check_stage(stage := config.mesh.get("zero", 3))
    gather = Whole(mesh, rules, dtype) if mesh.shape["fsdp"] > 1 else None

    def step(phase: Phase) -> PhaseStep:
        run = make_train_step(
            objective,
            apply,
            optimizer,
            ema=config.train.ema,
            ema_warmup=config.train.ema_warmup,
            accumulate=config.train.accumulate,
            weights=phase.active,
            gather=gather if stage == 2 else None,
        )
        everywhere = replicated(mesh)
        given = (shardings, batch_sharding(mesh), everywhere, places)
        run = compiled(run, programs, in_shardings=given, out_shardings=(shardings, everywhere))
        return PhaseStep(phase.until, objective.fields(phase.active), run)

    steps = tuple(map(step, experiment.phases))
    fits = gather and gather.fits_beside(abstract_params(model), memory)
    made = (sampled, optimizer, init, abstract, shardings, frozen, places, steps)
    return Program(*made, gather if fits else None)
