"""How a model is sampled, decided before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.checkpoints.card import Card
from ppflow_jax.checkpoints.weights import Weights
from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import ADAPTIVE, FITTED, SamplerConfig, Segment, evaluations
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.generate.explain import explain
from ppflow_jax.generate.plan_file import PlanFile
from ppflow_jax.models.conditions import supplied
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Apply, make_apply
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated
from ppflow_jax.systems.registry import FLOW, notes_of
from ppflow_jax.systems.routed import RoutedTables, check_routable

PLAIN = AccelerateConfig()


@dataclass(frozen=True)
class Plan:
    """Every time, stage, scale and shortcut of a sampler.

    Attributes:
      added: what `segments` have beyond the plain plan of `config`.
      weak: a weaker network in place of the null class (autoguidance).
      tuned: the plan file that it came from.
      notes: what a person should know of it.
      weights: of the model, if the plan depends on them.
    """

    model: ModelConfig
    flow: Flow
    config: SamplerConfig
    segments: tuple[Segment, ...]
    added: AccelerateConfig = PLAIN
    weak: Weights | None = None
    tuned: PlanFile | None = None
    notes: tuple[str, ...] = ()
    weights: Weights | None = None

    @property
    def nfe(self) -> int | None:
        """Network evaluations of an image; None for the adaptive solver."""
        return None if self.config.solver == ADAPTIVE else evaluations(self.segments)

    @property
    def times(self) -> tuple[float, ...]:
        """Grid points from noise (0) to data (1)."""
        return (self.segments[0].times[0], *(t for s in self.segments for t in s.times[1:]))

    def sampler(self, apply: Apply | None = None, dtype: str = "float32") -> Sampler:
        """What runs the plan.

        Args:
          apply: the network, if not that of `make_apply` with matrix products in `dtype`.

        Raises:
          InputError: guidance of more channels than there are.
        """
        weak = None
        if self.weak is not None:
            weak = make_apply(self.weak.card.model, dtype=jnp.dtype(dtype))
        apply = apply or make_apply(self.model, dtype=jnp.dtype(dtype))
        return Sampler(apply, self.model, self.flow, self.config, segments=self.segments, weak=weak)

    def explain(self, batch: int = 1) -> str:
        """A row for every segment: times, tokens, evaluations, FLOPs; memory for `batch` images."""
        weak = None if self.weak is None else self.weak.card.model
        return explain(self.sampler(), self.model, batch, weak)

    def __str__(self) -> str:
        return self.explain()

    @property
    def static(self) -> Any:
        """What its programs are compiled for: all but the guidance scales."""
        config = replace(self.config, cfg=(1.0,), cfg_until=())
        facts = [(s.kind, s.stages, s.guided, s.times, s.method) for s in self.segments]
        tables = [
            jax.tree.map(
                lambda a: np.asarray(a).tobytes(),
                (s.inputs, s.full, None if s.rows is None else s.rows.tables),
            )
            for s in self.segments
        ]
        weak = None if self.weak is None else self.weak.card.model
        return config, tuple(facts), repr(tables), weak


def guided_by(plan: Plan, card: Card, cfg: tuple[float, ...]) -> Plan:
    """The same plan with other guidance scales, one or one of every stage.

    The guidance that a tuned plan was fitted with leaves its scales of steps as they are.

    Raises:
      InputError: another number of scales.
    """
    config = replace(plan.config, cfg=cfg)
    if plan.tuned is None:
        return make_plan(card, config, plan.added, plan.weak, plan.weights)
    pyramid, fitted = plan.model.pyramid, plan.tuned.fitted
    if config.scales(pyramid) != plan.tuned.cfg:
        fitted = fitted.guided(config.scales(pyramid), pyramid)
    return replace(plan, config=config, segments=plan.tuned.segments(fitted))


def tuned_plan(
    card: Card, file: PlanFile, sha256: str, cfg: tuple[float, ...] | None = None
) -> Plan:
    """A plan of a file for a model; what does not fit but may be tried is in its notes.

    Args:
      sha256: of the model's weights.
      cfg: guidance scales instead of those of the fit.

    Raises:
      InputError: a plan of another pyramid, path or prediction, or that forecasts the features of
        another number of blocks.
    """
    for what, theirs, ours in (
        ("pyramid", file.pyramid, card.model.pyramid),
        ("path and prediction", file.flow, card.flow),
    ):
        if theirs != ours:
            raise InputError(
                f"the plan is of another {what} ({theirs}) than the model ({ours}): tune one for "
                "this model"
            )
    check_tunable(card.model)
    depth = file.forecast and file.forecast.of_blocks
    if depth and card.model.students:
        raise InputError(
            f"the plan forecasts {depth} blocks of every stage, the model has students in the "
            "place of some: give a plan without forecasts"
        )
    if depth not in (None, card.model.depth):
        raise InputError(
            f"the plan forecasts features of {depth} blocks, the model has {card.model.depth}: "
            "tune one for this model"
        )
    if isinstance(file.forecast, RoutedTables):
        check_routable(card.model)
    config = SamplerConfig(
        FITTED, len(file.fitted.stages), cfg=file.cfg, cfg_channels=file.cfg_channels
    )
    plan = Plan(card.model, card.flow, config, file.segments(file.fitted), tuned=file)
    notes = []
    if sha256 != file.made.get("checkpoint_sha256"):
        notes.append("the plan was fitted to other weights: its errors are not those of this model")
    if cfg is not None:
        plan = guided_by(plan, card, cfg)
        if plan.config.scales(card.model.pyramid) != file.cfg:
            scales = ",".join(f"{s:g}" for s in file.cfg)
            notes.append(f"the plan was fitted with guidance {scales}, and its errors are of that")
    return replace(plan, notes=tuple(notes))


def check_tunable(model: ModelConfig) -> None:
    """
    Raises:
      InputError: plan files are not for such models.
    """
    if names := supplied(model.conditions):
        raise InputError(
            f"plan files are not for models that are told the {' and the '.join(names)}: give a "
            "solver and steps"
        )


def make_plan(
    card: Card,
    config: SamplerConfig,
    added: AccelerateConfig = PLAIN,
    weak: Weights | None = None,
    weights: Weights | None = None,
) -> Plan:
    """The plan of a model.

    Args:
      weights: of the model, for a plan that depends on them (`--accelerate=width=1`).

    Raises:
      InputError: settings that do not fit the model or one another; a weak model that does not
        predict the same thing at the same times.
    """
    config.scales(card.model.pyramid)
    if weak is not None:
        _check_weak(weak, card)
        if added.width is not None:
            raise InputError(
                "width is that of one network, a weak model has another: leave width out of "
                "--accelerate, or the weak model"
            )
    weights = None if added.width is None else weights
    params = None if weights is None else weights.params
    segments = accelerated(config, card.model, card.flow, added, params)
    if weak is not None and any(segment.embedded for segment in segments):
        raise InputError("the model is told the guidance scale: leave the weak model out")
    notes = notes_of(objective_of(card), config)
    return Plan(
        *(card.model, card.flow, config, segments, added, weak), notes=notes, weights=weights
    )


def objective_of(card: Card) -> str:
    """What the model was trained with, as configurations have it."""
    return ((card.experiment or {}).get("flow") or {}).get("objective", FLOW)


def _check_weak(weak: Weights, card: Card) -> None:
    same = {
        "latents": lambda c: c.model.shape,
        "classes": lambda c: c.model.num_classes,
        "path and prediction": lambda c: c.flow,
        "stages": lambda c: c.model.pyramid,
        "conditions": lambda c: c.model.conditions,
    }
    for what, of in same.items():
        if of(weak.card) != of(card):
            raise InputError(
                f"the weak model {weak.path} has other {what} than the model "
                f"({of(weak.card)}, not {of(card)}): give a smaller or less trained one of the "
                "same kind"
            )
