"""A run that starts from weights: of their architecture, with other parts or more conditions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from ppflow_jax.checkpoints.base import named
from ppflow_jax.checkpoints.card import ALL, Card, read_card
from ppflow_jax.checkpoints.run import latest_card
from ppflow_jax.checkpoints.weights import load_weights
from ppflow_jax.errors import InputError
from ppflow_jax.files.place import place
from ppflow_jax.files.store import find_checkpoint
from ppflow_jax.models.adapters import NONE, adapter_paths, plain, text
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Params, abstract_params, init_params
from ppflow_jax.models.student_blocks import fresh
from ppflow_jax.models.students import STUDENTS
from ppflow_jax.models.trees import join, parted
from ppflow_jax.systems.registry import KINDS, canonical, take_conditions
from ppflow_jax.train.experiment import Experiment


def take_architecture(config: ConfigDict, workdir: str | None, told: Collection[str]) -> str | None:
    """Give `config.model` the sizes of the weights in `config.init_from`, and say which changed.

    The pyramid stays, because another one is another experiment, and so does what was `told` on the
    command line, as `config.model.width`: both must fit the weights. A run that is in `workdir`
    already has the architecture it began with, also where the weights are gone.

    Raises:
      InputError: no checkpoint in `config.init_from`.
    """
    if not config.init_from:
        return None
    begun = latest_card(place(workdir)) if workdir and place(workdir).is_dir() else None
    card = begun[1] if begun else read_card(find_checkpoint(config.init_from))
    changed = []
    for name, value in card.model.to_json().items():
        before = config.model.get(name)
        if name == "adapters" and before not in (None, NONE):
            continue  # those of this run, which must fit the weights too
        texts = name in KINDS or name == "network"
        before = canonical(before, name) if texts and before else before
        if name == "conditions":
            before, value = _together(before, value)
        if name == "pyramid" or f"config.model.{name}" in told or before in (None, value):
            continue
        config.model[name] = value
        changed.append(f"{name} {value} (not {before})")
    return f"architecture of {config.init_from}: {', '.join(changed)}" if changed else None


def _together(own: Sequence[str], theirs: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Conditions of the configuration, and those of the weights with what these do not have."""
    mine, found = (take_conditions({"conditions": texts}) for texts in (own, theirs))
    names = [condition.name for condition in found]
    more = (condition for condition in mine if condition.name not in names)
    return tuple(map(str, mine)), tuple(map(str, (*found, *more)))


def with_base(experiment: Experiment) -> Experiment:
    """The experiment, whose card names the weights that it starts from as those that stay.

    Raises:
      InputError: no checkpoint in `config.init_from`.
    """
    path = experiment.origin
    if not path:
        raise InputError(
            "config.train.trainable leaves a part of the weights as it is: say in config.init_from "
            "which weights that are, or train all with config.train.trainable=('.*',)"
        )
    return replace(experiment, card=replace(experiment.card, base=named(path)))


def open_start(
    path: str, card: Card, mesh: Mesh, setting: str = "config.init_from"
) -> tuple[Params, Callable[[Params, Array], Params]]:
    """The weights in `path`, and a function of them and a key: parameters of the model of `card`.

    They are the same but for parts of the blocks that the weights do not have, which start from
    what they replace (see `models.parts.Part.start`), conditions, which start fresh, adapters,
    which change nothing yet, and students, each the middle one of the blocks that it replaces.
    Where a part of the parameters is trained, classes may be others, which start as the null class.

    Args:
      setting: that has the path, for what is said of it.

    Raises:
      InputError: weights of another model, or without a way to these parts; damaged or unreadable.
    """
    folder = find_checkpoint(path)
    found, model = read_card(folder), card.model
    source = found.model
    if source.adapters and (source.block, source.adapters) != (model.block, model.adapters):
        raise InputError(
            f"{setting}={folder} has adapters {text(source.adapters)}: keep them in "
            f"config.model.adapters, or merge them: ppflow convert --merge --source={path} "
            "--target=DIR"
        )
    grown = set(source.conditions) <= set(model.conditions)
    conditions = model.conditions if grown else source.conditions
    both = dict(conditions=conditions, students=source.students or model.students)
    other = replace(found, model=plain(replace(source, block=model.block, **both)))
    if card.trainable != ALL and model.has_trunk:
        other = replace(other, model=replace(other.model, num_classes=model.num_classes))
    if difference := other.differences(replace(card, model=plain(model))):
        raise InputError(
            f"{setting}={folder} holds another model ({difference}): use a "
            "configuration of the same model"
        )

    def start(params: Params, key: Array) -> Params:
        made = {"blocks": model.block.start(model, source, params["blocks"], key)}
        if model.conditions != source.conditions:
            new = init_params(model, key)["conditions"]
            made["conditions"] = new | params.get("conditions", {})
        if model.students != source.students:
            made[STUDENTS] = fresh(model.students, params["blocks"])
        if model.num_classes != source.num_classes:
            made["label"] = _all_null(model, params["label"])
        params = params | made
        new = adapter_paths(model) - adapter_paths(source)
        return join(params, parted(init_params(model, key), new.__contains__)[0]) if new else params

    if not model.has_trunk:  # nor parts to start
        return load_weights(folder, found, mesh), lambda params, key: params
    try:
        made = jax.eval_shape(start, abstract_params(source), jax.random.key(0))
    except InputError as e:
        raise InputError(f"{setting}={folder}: {e}") from e
    shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
    if shapes(made) != shapes(abstract_params(model)):
        raise AssertionError(f"{model.block} starts from {source.block} with other leaves than its")
    return load_weights(folder, found, mesh), start


def _all_null(model: ModelConfig, label: Params) -> Params:
    """A table of the model's classes, each of which is the null class of another."""
    null = label["embedding"][-1:]
    return {"embedding": jnp.broadcast_to(null, (model.num_classes + 1, model.width))}
