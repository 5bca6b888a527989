"""What a run begins with: its state, and what its steps need that is not trained."""

from __future__ import annotations

from pathlib import Path

import jax
from jax.sharding import Mesh

from ppflow_jax.checkpoints.card import read_card
from ppflow_jax.checkpoints.run import Checkpoints, latest_card
from ppflow_jax.checkpoints.weights import load_frozen
from ppflow_jax.devices.sharding import replicated
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import writable_directory
from ppflow_jax.files.place import is_object
from ppflow_jax.files.store import find_checkpoint
from ppflow_jax.models.network import Params
from ppflow_jax.models.trees import split
from ppflow_jax.systems.mixer_distillation import check_teacher
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.init_from import open_start
from ppflow_jax.train.program import Program
from ppflow_jax.train.skip import SKIPPED, no_counts
from ppflow_jax.train.state import TrainState, extended, state_from, with_terms


def tried_store(workdir: str) -> Path | None:
    """A workdir in an object store, tried before anything is compiled; None: it is on a disk.

    Raises:
      InputError: it cannot be written; several processes, each of which would have a part of the
        checkpoints on its own disk.
    """
    if not is_object(workdir):
        return None
    if jax.process_count() > 1 and not workdir.startswith("gs://"):
        raise InputError(
            f"{workdir}: {jax.process_count()} processes cannot write checkpoints to s3:// "
            "together: mount the bucket (mount-s3) and give the folder"
        )
    return writable_directory(workdir)


def open_frozen(
    experiment: Experiment, program: Program, mesh: Mesh, root: Path
) -> dict[str, Params]:
    """What a step is given as `frozen`, placed as `program` says.

    `base` is what a run does not train of its network, see `checkpoints.weights.load_frozen`. A
    teacher, if the objective has one, has weights of the run's network; a run that goes on reads
    them again.

    Raises:
      InputError: there is no teacher and must be one, or the other way round; weights of another
        network; a base that is not what it was.
    """
    path, names = experiment.config.train.teacher, experiment.objective.frozen
    kind = experiment.config.flow.objective
    if names and not path:
        raise InputError(
            f"objective {kind} needs a teacher: give its checkpoint as --config.train.teacher"
        )
    if path and not names:
        raise InputError(f"objective {kind} takes no teacher: leave config.train.teacher empty")
    found = load_frozen(root, experiment.card, mesh)
    if names:
        check_teacher(experiment.objective, read_card(find_checkpoint(path)).model)
        params, start = open_start(path, experiment.card, mesh, "config.train.teacher")
    for name in names:
        grown = jax.jit(start, out_shardings=program.frozen_shardings[name])
        found[name] = grown(params, jax.random.key(0))
    return found


def first_state(
    experiment: Experiment, program: Program, checkpoints: Checkpoints, mesh: Mesh
) -> TrainState:
    """State to continue from, made or restored straight into its shardings."""
    config, shardings = experiment.config, program.shardings
    if (latest := checkpoints.latest()) is not None:
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            program.abstract,
            shardings,
        )
        return _restored(checkpoints, latest, target, mesh)
    if experiment.origin:
        params, start = open_start(experiment.origin, experiment.card, mesh)

        def begin(params, key):
            params, _ = split(start(params, key), experiment.trainable)
            params = with_terms(params, experiment.objective, experiment.card.model, key)
            return extended(state_from(params, program.optimizer), config.train)

        return jax.jit(begin, out_shardings=shardings)(params, jax.random.key(config.seed))
    return jax.jit(program.init, out_shardings=shardings)(jax.random.key(config.seed))


def _restored(checkpoints: Checkpoints, step: int, target: TrainState, mesh: Mesh) -> TrainState:
    """The state of `step`; the counts of skipped steps begin, and end, with their setting."""
    _, card = latest_card(checkpoints.folder.parent)
    kept = bool(card.experiment["train"].get("skip_nonfinite"))
    if kept == (SKIPPED in target):
        return checkpoints.restore(step, target)
    fresh = jax.jit(no_counts, out_shardings=replicated(mesh))()
    if not kept:
        others = {name: tree for name, tree in target.items() if name != SKIPPED}
        return checkpoints.restore(step, others) | {SKIPPED: fresh}
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), fresh
    )
    state = checkpoints.restore(step, target | {SKIPPED: placed})
    return {name: state[name] for name in target}
