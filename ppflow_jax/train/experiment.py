"""The experiment that a configuration describes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from ml_collections import ConfigDict

from ppflow_jax.checkpoints.card import ALL, Card
from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.terms import Objective, Phase, Term, parse_phases, phased
from ppflow_jax.flow.times import shift_of
from ppflow_jax.models import students
from ppflow_jax.models.adapters import NONE, parse, text
from ppflow_jax.models.conditions import Channels
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import abstract_params
from ppflow_jax.models.trees import leaves, split
from ppflow_jax.pyramid import Pyramid
from ppflow_jax.systems.ppcl import check_trained
from ppflow_jax.systems.registry import notes_of, take_block, take_conditions, take_network, term
from ppflow_jax.systems.registry import objective as objective_of
from ppflow_jax.systems.registry import task as task_of
from ppflow_jax.systems.registry import times as times_of
from ppflow_jax.systems.tasks import Task
from ppflow_jax.train.optimizer import OptimConfig, muon_axes
from ppflow_jax.train.posthoc import check_widths
from ppflow_jax.train.trackers import check_trackers


@dataclass(frozen=True)
class Experiment:
    """A configuration, checked and turned into the parts of a run; nothing is allocated.

    The card's experiment is the configuration without `resume_changed`, which is a word to one
    command and not a setting of the run.

    Raises (in `from_config`):
      InputError: any value out of range or parts that do not fit together.
    """

    card: Card
    objective: Objective
    phases: tuple[Phase, ...]
    optim: OptimConfig
    sampler: SamplerConfig
    config: ConfigDict
    task: Task | None = None

    @property
    def origin(self) -> str:
        """Checkpoint whose weights a new run starts with: a student's are those of its teacher."""
        return self.config.init_from or self.config.train.teacher

    @property
    def trainable(self) -> tuple[str, ...]:
        """Patterns of the network's leaves that are trained, see `models.trees.split`."""
        return tuple(self.config.train.trainable)

    @classmethod
    def from_config(cls, config: ConfigDict) -> Experiment:
        c = config.model
        settings = {k: c[k] for k in c if k not in ("pyramid", "dtype", "remat", "attention")}
        made: dict[str, Any] = dict(block=(block := take_block(settings)))
        made["conditions"] = take_conditions(settings)
        made["network"] = take_network(settings)
        made["adapters"] = parse(settings.pop("adapters", NONE))
        made["students"] = students.parse(settings.pop("students", NONE))
        model = ModelConfig(pyramid=Pyramid.parse(c.pyramid), **made, **settings)
        if task := task_of(config.data.task):
            model = _told(model, task, config.data.space)
        shift = config.flow.shift or shift_of(math.prod(model.shape))
        flow = Flow(config.flow.path, config.flow.prediction, shift)
        terms = tuple(map(term, config.flow.terms))
        _check_network(model, flow, terms)
        base = FlowObjective(
            pyramid=model.pyramid,
            flow=flow,
            null_label=model.null_label,
            weighting=config.flow.weighting,
            label_drop=config.flow.label_drop,
            stage_share=tuple(config.flow.stage_share),
            stage_times=tuple(tuple(map(float, pair)) for pair in config.flow.stage_times),
            terms=terms,
            conditions=model.asked,
            logit_normal=times_of(config.flow.times),
        )
        _check_given(base, task, tuple(config.data.fields))
        objective = objective_of(config.flow.objective, base, model)
        phases = parse_phases(
            config.train.phases,
            config.train.steps,
            always={name: config.flow[name] for name in block.term_names} | phased(objective),
            names=[term.name for term in terms],
        )
        _check_fields(base, tuple(config.data.fields))
        sampler = sampler_of(config.sample)
        sampler.scales(model.pyramid)
        notes_of(config.flow.objective, sampler)
        _check(config)
        _check_trainable(model, tuple(config.train.trainable))
        check_trained(objective, model, tuple(config.train.trainable))
        optim = OptimConfig(**config.optim)
        _check_muon(optim, model, tuple(config.train.trainable))
        values = json.loads(config.to_json_best_effort())
        values.pop("resume_changed", None)
        values["model"] |= block.to_json()  # as checkpoints have it
        values["model"]["conditions"] = list(map(str, model.conditions))
        values["model"]["network"] = str(model.network or NONE)
        values["data"]["task"] = str(task or "none")
        values["model"]["adapters"] = text(model.adapters)
        values["model"]["students"] = students.text(model.students)
        card = Card(model, flow, config.data.space, values)
        return cls(card, objective, phases, optim, sampler, config, task)


def _told(model: ModelConfig, task: Task, space: str) -> ModelConfig:
    """The model with the condition of its task, unless it has it.

    Raises:
      InputError: the task does not fit the model, or the model's condition is another one.
    """
    needed = task.for_model(model, space)
    own = [c for c in model.conditions if c.name == needed.name]
    if not own:
        return replace(model, conditions=(*model.conditions, needed))
    if not isinstance(own[0], Channels) or replace(own[0], drop=needed.drop) != needed:
        raise InputError(
            f"config.data.task={task} gives {needed}, config.model.conditions has {own[0]}: leave "
            "that out"
        )
    return model


def _check_network(model: ModelConfig, flow: Flow, terms: tuple[Term, ...]) -> None:
    """
    Raises:
      InputError: a path that the network does not predict along, or a term that reads its blocks.
    """
    if model.network is None:
        return
    model.network.check_path(flow.path)
    if not model.has_trunk and (inside := [term for term in terms if term.taps]):
        raise InputError(
            f"config.flow.terms: {inside[0].name} reads blocks of the transformer, which "
            f"{model.network.kind} does not have: leave it out"
        )


def _check_given(objective: FlowObjective, task: Task | None, fields: tuple[str, ...]) -> None:
    """
    Raises:
      InputError: nothing gives values to one of the conditions.
    """
    given = (*fields, *(() if task is None else (task.condition,)))
    if lacking := [c.name for c in objective.conditions if c.name not in given]:
        raise InputError(
            f"config.model.conditions has {', '.join(lacking)}, and nothing gives values for it in "
            "training: leave it out, set config.data.task to what does, or name a field of the "
            "data in config.data.fields"
        )


def _check_trainable(model: ModelConfig, patterns: tuple[str, ...]) -> None:
    if patterns == ALL:
        return
    if not patterns:
        raise InputError("config.train.trainable is empty: give patterns of what is trained")
    for pattern in patterns:
        try:
            found, _ = split(abstract_params(model), (pattern,))
        except re.error as e:
            raise InputError(
                f"config.train.trainable: {pattern!r} is no regular expression ({e})"
            ) from e
        if not found:
            names = ", ".join(
                dict.fromkeys(str(path[0]) for path, _ in leaves(abstract_params(model)))
            )
            raise InputError(
                f"config.train.trainable: {pattern!r} is no leaf; their paths begin with {names}"
            )


def _check_muon(optim: OptimConfig, model: ModelConfig, patterns: tuple[str, ...]) -> None:
    if optim.name != "muon":
        return
    axes = muon_axes(split(abstract_params(model), patterns)[0], model.matrices)
    if not jax.tree.leaves(axes):
        raise InputError(
            "config.optim.name=muon: it is for the matrices of the blocks, and config.train."
            "trainable has none of them: use config.optim.name=adamw"
        )


def sampler_of(sample: Mapping[str, Any] | ConfigDict) -> SamplerConfig:
    """How a run samples, from the `sample` of its configuration.

    Raises:
      InputError: unknown solver, or a value out of range.
    """
    return SamplerConfig(sample["solver"], sample["steps"], cfg=tuple(sample["cfg"]))


def _check_fields(objective: FlowObjective, fields: tuple[str, ...]) -> None:
    """
    Raises:
      InputError: a term reads a field that is not read from the data.
    """
    for each in objective.terms:
        if missing := [name for name in each.fields if name not in fields]:
            raise InputError(
                f"config.flow.terms: {each.name} reads the field {missing[0]}, config.data.fields "
                f"has {', '.join(fields) or 'none'}: add it there"
            )


def _check(config: ConfigDict) -> None:
    t = config.train
    if t.accumulate < 1 or min(t.steps, t.log_every, t.save_every, t.keep) < 1:
        raise InputError("config.train: steps, *_every, keep and accumulate must be at least 1")
    if config.sample.count < 1 or min(config.sample.every, config.eval.every) < 0:
        raise InputError(
            "config.sample.count must be at least 1, config.sample.every and config.eval.every at "
            "least 0 (off)"
        )
    if type(t.skip_nonfinite) is not int or t.skip_nonfinite < 0:
        raise InputError(
            f"config.train.skip_nonfinite must be a whole number, 0 (off) or more, got "
            f"{t.skip_nonfinite}"
        )
    check_trackers(t.trackers)
    check_widths(t.posthoc_ema, "config.train.posthoc_ema")
    if not 0 <= t.ema < 1:
        raise InputError(f"config.train.ema must be in [0, 1), got {t.ema}")
    if config.model.dtype not in ("float32", "bfloat16"):
        raise InputError(f"unknown dtype {config.model.dtype!r}: float32 or bfloat16")
    if config.data.space not in ("latents", "pixels"):
        raise InputError(f"unknown space {config.data.space!r}: latents or pixels")
    if config.data.unreadable not in ("error", "skip") or config.data.workers < 0:
        raise InputError("config.data: unreadable is error or skip, workers at least 0")
