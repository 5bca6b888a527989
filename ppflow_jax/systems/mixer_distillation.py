"""A model with another mixer learns from the one with full attention that it was made from.

Beside the flow, whose loss stays as it is, the student's prediction and the attention branch of
every n-th block, before its gate, are to be the teacher's:

    loss = flow + kd mean |v - v_teacher|^2 + features mean_blocks mean |a - a_teacher|^2

as in CLEAR (arXiv 2412.16112) and LinFusion (arXiv 2409.02097), both with 0.5 and 0.5. Each sees
its own tokens. The teacher has the leaves of the student, of which full attention has no use for
some, so that one network computes both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import Draws, FlowObjective, OnFlow, over_time
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.terms import Batch, Metrics, View, Weights
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.leaves import Described
from ppflow_jax.models.network import Apply, Output, Params
from ppflow_jax.models.parts import BlockSpec, FullAttention
from ppflow_jax.models.stack import Taps

TEACHER = "teacher"


@dataclass(frozen=True)
class Distil(Described):
    """Settings.

    Attributes:
      kd, features: weights of the two terms.
      every: the branches of blocks every - 1, 2 every - 1, ... are compared.

    Raises:
      InputError: a negative weight, or `every` below 1.
    """

    kind = "distil"
    kd: float = 0.5
    features: float = 0.5
    every: int = 4

    def __post_init__(self):
        if min(self.kd, self.features) < 0 or self.every < 1:
            raise InputError(f"{self}: weights must be at least 0, every at least 1")

    def on(self, base: FlowObjective, model: ModelConfig) -> Distillation:
        """
        Raises:
          InputError: a model that full attention cannot take the place in, terms, or no block to
            compare.
        """
        mixer = model.block.mixer
        if mixer == FullAttention() or not mixer.attends:
            raise InputError(
                f"objective {self.kind} teaches another mixer what full attention does, and "
                f"config.model.mixer is {mixer}: set it to clear:... or linfusion"
            )
        if base.terms:
            raise InputError(f"objective {self.kind} has no terms: leave config.flow.terms out")
        if self.features and self.every > model.depth:
            raise InputError(f"{self}: the model has {model.depth} blocks, choose a smaller every")
        return Distillation(base, self, model.depth)

    def notes(self, config: SamplerConfig) -> tuple[str, ...]:
        """Nothing: it is sampled as any model."""
        return ()


@dataclass(frozen=True)
class Distillation(OnFlow):
    """A student and its teacher, `frozen["teacher"]`.

    Attributes:
      base: the flow's own loss.
      settings: weights.
      depth: blocks of the model.
    """

    base: FlowObjective
    settings: Any
    depth: int

    frozen = (TEACHER,)

    @property
    def evaluated(self) -> tuple[int, ...]:
        """The teacher, once; counted as the student's FLOPs, of which it has more."""
        return self.pattern

    @property
    def taps(self) -> Taps:
        """The branches that are compared."""
        every = self.settings.every if self.settings.features else self.depth + 1
        return Taps(mixed=tuple(range(every - 1, self.depth, every)))

    def loss(
        self,
        apply: Apply,
        params: Params,
        frozen: Mapping[str, Any],
        batch: Batch,
        draws: Draws,
        weights: Weights,
    ) -> tuple[Float[Array, ""], Metrics]:
        """The flow's loss and both terms; metrics `loss` (the flow's), `kd` and `features`."""
        base, settings = self.base, self.settings
        views, outputs = base.predicted(apply, params, frozen, batch, draws, self.taps)
        theirs = self.teacher(apply, frozen, views, attending, self.taps)
        losses = [base.errors(view, out) for view, out in zip(views, outputs)]
        total, metrics = over_time(base.pyramid, losses, outputs, weights, base.durations)
        for name, of in (("kd", of_predictions), ("features", _of_taps)):
            if weight := getattr(settings, name):
                value = self.over_stages(of, outputs, theirs)
                total, metrics[name] = total + weight * value, value
        return total, metrics

    def teacher(
        self,
        apply: Apply,
        frozen: Mapping[str, Any],
        views: Sequence[View],
        parts: Callable[[BlockSpec], BlockSpec],
        taps: Taps,
    ) -> tuple[Output, ...]:
        """What the teacher gives where the student was asked, without gradient, by stage."""
        xt, t, y, stages = zip(*((view.xt, view.t, view.y, view.stage) for view in views))
        teacher = jax.lax.stop_gradient(frozen[TEACHER])
        tapped = {"taps": taps} if taps else {}
        return apply(teacher, xt, t, y, stages, parts=parts, **tapped)

    def over_stages(
        self,
        of: Callable[[Output, Output], Float[Array, ""]],
        ours: Sequence[Output],
        theirs: Sequence[Output],
    ) -> Float[Array, ""]:
        """`of` student and teacher, a mean over time as the loss."""
        return sum(d * of(a, b) for d, a, b in zip(self.base.durations, ours, theirs))

    def check_teacher(self, teacher: ModelConfig) -> None:
        """
        Raises:
          InputError: it was trained with another mixer than full attention.
        """
        if teacher.block.mixer != FullAttention():
            raise InputError(
                f"config.train.teacher: objective {Distil.kind} needs a teacher with full "
                f"attention, this one has {teacher.block.mixer}: give the run that it was made from"
            )


def attending(block: BlockSpec) -> BlockSpec:
    """With full attention, on the same leaves."""
    return replace(block, mixer=FullAttention())


def check_teacher(objective: Any, teacher: ModelConfig) -> None:
    """
    Raises:
      InputError: `objective` is a `Distillation`, which evaluates parts that the teacher was not
        trained with.
    """
    if isinstance(objective, Distillation):
        objective.check_teacher(teacher)


def difference(a: Array, b: Array) -> Float[Array, ""]:
    """Mean squared, in float32."""
    return jnp.mean(jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)))


def of_predictions(ours: Output, theirs: Output) -> Float[Array, ""]:
    """Their mean squared difference."""
    return difference(ours.prediction, theirs.prediction)


def _of_taps(ours: Output, theirs: Output) -> Float[Array, ""]:
    each = [difference(ours.taps[name], theirs.taps[name]) for name in ours.taps]
    return jnp.mean(jnp.stack(each)) if each else jnp.zeros(())
