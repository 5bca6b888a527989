"""What a model in slices learns from the dense one that it was cut from (arXiv 2510.09094).

Dense2MoE distils in stages, here weights over time (`config.train.phases`):

    shared:  mean |v_0 - v_teacher|^2, v_0 of the shared slices alone
    experts: mean |v - v_teacher|^2 + features mean_l |h_l - t_l|^2 / |t_l|^2

h_l and t_l are the tokens after block l of student and teacher, so that every layer counts by its
relative error. `balance`, the term of the experts, is beside them with its own weight. There is no
loss of the flow; `loss` in metrics is that of the student, to be looked at.

With a mixture of blocks (`mixture_of_blocks`) `every` is its group, so that the tokens after a
group are to be those of the teacher, whose blocks are all computed.

The teacher is a dense model. Its leaves are those of the student, cut in the same way, with which
all slices and gates of one compute it (`dense2moe.whole`), so that one network computes both.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import Draws, FlowObjective, over_time
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.strata import with_block_terms
from ppflow_jax.flow.terms import Batch, Metrics, View, Weights
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.leaves import Described
from ppflow_jax.models.network import Apply, Output, Params
from ppflow_jax.models.parts import DIT, FullAttention
from ppflow_jax.models.stack import Taps
from ppflow_jax.systems.dense2moe import Dense2MoE, shared_only, whole
from ppflow_jax.systems.mixer_distillation import Distillation, difference, of_predictions

SHARED, EXPERTS = "shared", "experts"


@dataclass(frozen=True)
class SlicesDistil(Described):
    """Settings.

    Attributes:
      features: weight of the tokens between blocks.
      every: the tokens after every so many blocks are compared.

    Raises:
      InputError: a negative weight, or `every` below 1.
    """

    kind = "dense2moe"
    features: float = 1.0
    every: int = 1

    def __post_init__(self):
        if not self.features >= 0 or self.every < 1:
            raise InputError(f"{self}: features must be at least 0, every at least 1")

    def on(self, base: FlowObjective, model: ModelConfig) -> SlicesDistillation:
        """
        Raises:
          InputError: a model without slices or full attention, terms, or no block to compare.
        """
        if not isinstance(model.block.ffn, Dense2MoE):
            raise InputError(
                f"objective {self.kind} teaches a model in slices, and config.model.ffn is "
                f"{model.block.ffn}: set it to dense2moe:..."
            )
        if model.block.mixer != FullAttention():
            raise InputError(
                f"objective {self.kind} has a dense teacher with full attention, and "
                f"config.model.mixer is {model.block.mixer}: set it to attention"
            )
        if base.terms:
            raise InputError(f"objective {self.kind} has no terms: leave config.flow.terms out")
        if self.features and self.every > model.depth:
            raise InputError(f"{self}: the model has {model.depth} blocks, choose a smaller every")
        return SlicesDistillation(base, self, model.depth)

    def notes(self, config: SamplerConfig) -> tuple[str, ...]:
        """Nothing: it is sampled as any model."""
        return ()


@dataclass(frozen=True)
class SlicesDistillation(Distillation):
    """A student and its teacher, `frozen["teacher"]`; attributes as of `Distillation`."""

    settings: SlicesDistil

    phased: ClassVar[Mapping[str, float]] = {SHARED: 0.0, EXPERTS: 1.0}

    @property
    def taps(self) -> Taps:
        """The tokens that are compared."""
        every = self.settings.every if self.settings.features else self.depth + 1
        return Taps(h=tuple(range(every, self.depth + 1, every)))

    def fields(self, weights: Weights) -> tuple[str, ...]:
        """
        Raises:
          InputError: nothing to learn.
        """
        if not any(weights.get(name) for name in self.phased):
            raise InputError("config.train.phases has a phase with neither shared nor experts")
        return self.base.fields(weights)

    def check_teacher(self, teacher: ModelConfig) -> None:
        if teacher.block != DIT:
            raise InputError(
                f"config.train.teacher: objective {SlicesDistil.kind} needs a dense teacher, this "
                f"one has {teacher.block}: give the run that the slices are cut from"
            )

    def loss(
        self,
        apply: Apply,
        params: Params,
        frozen: Mapping[str, Any],
        batch: Batch,
        draws: Draws,
        weights: Weights,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Both terms with their weights, and the balance.

        Metrics: `loss`, that of the flow, of the student with its experts or, where these have no
        weight, of its shared slices; the terms; `features`, a part of `experts`.
        """
        base, features = self.base, self.settings.features
        given = params, frozen, batch, draws
        total, metrics = jnp.zeros(()), dict[str, Array]()
        theirs: tuple[Output, ...] = ()
        if weights.get(EXPERTS):
            views, ours = base.predicted(apply, *given, self.taps)
            theirs = self.teacher(apply, frozen, views, whole, self.taps)
            value = self.over_stages(of_predictions, ours, theirs)
            if features:
                metrics["features"] = self.over_stages(relative_difference, ours, theirs)
                value += features * metrics["features"]
            total += weights[EXPERTS] * value
            total, balance = with_block_terms(total, base.pyramid, ours, weights, base.durations)
            metrics |= balance | {EXPERTS: value, "loss": self._flow(views, ours)}
        if weights.get(SHARED):
            alone = functools.partial(apply, parts=shared_only)
            views, ours = base.predicted(alone, *given)
            theirs = theirs or self.teacher(apply, frozen, views, whole, Taps())
            value = self.over_stages(of_predictions, ours, theirs)
            total += weights[SHARED] * value
            metrics = {"loss": self._flow(views, ours)} | metrics | {SHARED: value}
        return total, metrics

    def _flow(self, views: Sequence[View], outputs: Sequence[Output]) -> Float[Array, ""]:
        losses = [self.base.errors(view, output) for view, output in zip(views, outputs)]
        return over_time(self.base.pyramid, losses, outputs, {}, self.base.durations)[0]


def relative_difference(ours: Output, theirs: Output) -> Float[Array, ""]:
    """Mean squared over the mean square of the teacher's, of tokens; the mean over blocks."""
    each = []
    for name, tokens in theirs.taps.items():
        error = difference(ours.taps[name], tokens)
        each.append(error / jnp.mean(jnp.square(tokens.astype(jnp.float32))))
    return jnp.mean(jnp.stack(each))
