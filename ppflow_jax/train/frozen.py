"""What a training step needs that is not trained: on the devices, in no checkpoint."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from ppflow_jax.errors import InputError
from ppflow_jax.models.network import Params
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.init_from import open_start
from ppflow_jax.train.program import Program


def open_frozen(experiment: Experiment, program: Program, mesh: Mesh) -> dict[str, Params]:
    """Weights of the teacher, if the objective has one, as weights of the run's network.

    They are cut like these over the devices. A run that goes on reads them again.

    Raises:
      InputError: there is no teacher and must be one, or the other way round; weights of another
        network.
    """
    path, names = experiment.config.train.teacher, experiment.objective.frozen
    kind = experiment.config.flow.objective
    if names and not path:
        raise InputError(
            f"objective {kind} needs a teacher: give its checkpoint as --config.train.teacher"
        )
    if path and not names:
        raise InputError(f"objective {kind} takes no teacher: leave config.train.teacher empty")
    if not names:
        return {}
    params, start = open_start(path, experiment.card, mesh, "config.train.teacher")
    grown = jax.jit(start, out_shardings=program.shardings["ema"])
    return {name: grown(params, jax.random.key(0)) for name in names}
