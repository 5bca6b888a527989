"""How a model is sampled, decided before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import numpy as np

from ppflow_jax.checkpoints.card import Card
from ppflow_jax.cost.explain import explain
from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import ADAPTIVE, SamplerConfig, Segment, evaluations
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import make_apply
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated


@dataclass(frozen=True)
class Plan:
    """Every time, stage, scale and shortcut of a sampler, decided before anything is computed."""

    model: ModelConfig
    flow: Flow
    config: SamplerConfig
    segments: tuple[Segment, ...]

    @property
    def nfe(self) -> int | None:
        """Network evaluations of an image; None for the adaptive solver."""
        return None if self.config.solver == ADAPTIVE else evaluations(self.segments)

    @property
    def times(self) -> tuple[float, ...]:
        """Grid points from noise (0) to data (1)."""
        return (self.segments[0].times[0], *(t for s in self.segments for t in s.times[1:]))

    def explain(self, batch: int = 1) -> str:
        """A row for every segment: times, tokens, evaluations, FLOPs; memory for `batch` images."""
        sampler = Sampler(
            make_apply(self.model), self.model, self.flow, self.config, segments=self.segments
        )
        return explain(sampler, self.model, batch)

    def __str__(self) -> str:
        return self.explain()


def static(plan: Plan) -> Any:
    """What the programs of a plan are compiled for: all but its guidance scales."""
    config = replace(plan.config, cfg=(1.0,), cfg_until=())
    facts = [(s.kind, s.stages, s.guided, s.times, s.method) for s in plan.segments]
    tables = [
        jax.tree.map(lambda a: np.asarray(a).tobytes(), (s.inputs, s.full)) for s in plan.segments
    ]
    return config, tuple(facts), repr(tables)


def make_plan(
    card: Card,
    steps: int,
    solver: str,
    cfg: float | int | Sequence[float | int],
    accelerate: str,
    settings: dict[str, Any],
) -> Plan:
    """See `Model.plan`."""
    known = [f.name for f in fields(SamplerConfig) if f.name not in ("steps", "solver", "cfg")]
    if unknown := [k for k in settings if k not in known]:
        raise InputError(f"plan has no setting {unknown[0]!r}: give some of {', '.join(known)}")
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise InputError(f"steps={steps!r}: give a whole number")
    if not isinstance(solver, str) or not isinstance(accelerate, str):
        raise InputError(f"solver={solver!r}, accelerate={accelerate!r}: give text")
    try:
        scales = tuple(np.atleast_1d(np.asarray(cfg, float)).tolist())
        config = SamplerConfig(solver, steps, cfg=scales, **settings)
    except InputError:
        raise
    except (TypeError, ValueError) as e:
        raise InputError(f"cfg={cfg!r} {settings or ''}: {e}") from e
    config.scales(card.model.pyramid)
    added = AccelerateConfig.parse(accelerate)
    segments = accelerated(config, card.model, card.flow, added)
    return Plan(card.model, card.flow, config, segments)
