"""The experiment that a configuration describes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from ppflow_jax.checkpoints.card import Card
from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.terms import Phase, parse_phases
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.pyramid import Pyramid
from ppflow_jax.systems.registry import take_block, term
from ppflow_jax.train.optimizer import OptimConfig


@dataclass(frozen=True)
class Experiment:
    """A configuration, checked and turned into the parts of a run; nothing is allocated.

    The card's experiment is the configuration without `resume_changed`, which is a word to one
    command and not a setting of the run.

    Raises (in `from_config`):
      InputError: any value out of range or parts that do not fit together.
    """

    card: Card
    objective: FlowObjective
    phases: tuple[Phase, ...]
    optim: OptimConfig
    sampler: SamplerConfig
    config: ConfigDict

    @classmethod
    def from_config(cls, config: ConfigDict) -> Experiment:
        c = config.model
        settings = {k: c[k] for k in c if k not in ("pyramid", "dtype", "remat", "attention")}
        block = take_block(settings)
        model = ModelConfig(pyramid=Pyramid.parse(c.pyramid), block=block, **settings)
        flow = Flow(config.flow.path, config.flow.prediction)
        terms = tuple(map(term, config.flow.terms))
        objective = FlowObjective(
            pyramid=model.pyramid,
            flow=flow,
            null_label=model.null_label,
            weighting=config.flow.weighting,
            label_drop=config.flow.label_drop,
            stage_share=tuple(config.flow.stage_share),
            stage_times=tuple(tuple(map(float, pair)) for pair in config.flow.stage_times),
            terms=terms,
        )
        phases = parse_phases(
            config.train.phases,
            config.train.steps,
            always={name: config.flow[name] for name in block.term_names},
            names=[term.name for term in terms],
        )
        sampler = sampler_of(config.sample)
        sampler.scales(model.pyramid)
        _check(config)
        values = json.loads(config.to_json_best_effort())
        values.pop("resume_changed", None)
        values["model"] |= block.to_json()  # as checkpoints have it
        card = Card(model, flow, config.data.space, values)
        return cls(card, objective, phases, OptimConfig(**config.optim), sampler, config)


def sampler_of(sample: Mapping[str, Any] | ConfigDict) -> SamplerConfig:
    """How a run samples, from the `sample` of its configuration.

    Raises:
      InputError: unknown solver, or a value out of range.
    """
    return SamplerConfig(sample["solver"], sample["steps"], cfg=tuple(sample["cfg"]))


def _check(config: ConfigDict) -> None:
    t = config.train
    if t.accumulate < 1 or min(t.steps, t.log_every, t.save_every, t.keep) < 1:
        raise InputError("config.train: steps, *_every, keep and accumulate must be at least 1")
    if config.sample.count < 1 or min(config.sample.every, config.eval.every) < 0:
        raise InputError(
            "config.sample.count must be at least 1, config.sample.every and config.eval.every at "
            "least 0 (off)"
        )
    if not 0 <= t.ema < 1:
        raise InputError(f"config.train.ema must be in [0, 1), got {t.ema}")
    if config.model.dtype not in ("float32", "bfloat16"):
        raise InputError(f"unknown dtype {config.model.dtype!r}: float32 or bfloat16")
    if config.data.space not in ("latents", "pixels"):
        raise InputError(f"unknown space {config.data.space!r}: latents or pixels")
    if config.data.unreadable not in ("error", "skip") or config.data.workers < 0:
        raise InputError("config.data: unreadable is error or skip, workers at least 0")
