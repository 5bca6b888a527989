"""Students of intervals of blocks, each distilled alone (PPCL, arXiv 2511.16156).

A student stands in one stage in the place of blocks u ... v (see `models.students`). It sees what
the teacher's block u sees, and learns what leaves the teacher's block v,

    sum_d (s / |s| - h / |h|)^2 + magnitude (log |s| - log |h|)^2,

the mean over tokens. The first term is the release's, 2 - 2 cos. It leaves the size of the tokens
free, which a network with a norm after its blocks does not see and SiT does: so the second, which
is ours. A linear map in the place of an FFN sees and learns the branch of that FFN before its gate,
by sum_d |s_d / |s| - f_d / |f||, with the same second term.

One pass of the teacher, whose blocks are the model's own and stay as they are, serves all students;
none sees another, so that any of them can be left out afterwards.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import Draws, FlowObjective, OnFlow
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.terms import Batch, Metrics, Weights
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import Block, modulate
from ppflow_jax.models.leaves import Described
from ppflow_jax.models.network import Apply, Output, Params, abstract_params
from ppflow_jax.models.students import STUDENTS, Student, blocks_of, ffns_of
from ppflow_jax.models.trees import leaves, split

TRAINABLE = (f"{STUDENTS}/.*",)
EPSILON = 1e-8  # added to norms, as in the release
# What a student makes, and what it is to make
Pair = tuple[Float[Array, "b n d"], Float[Array, "b n d"]]


@dataclass(frozen=True)
class Ppcl(Described):
    """Settings.

    Attributes:
      magnitude: weight of the term of norms; 0 is the release's loss.

    Raises:
      InputError: a negative weight.
    """

    kind = "ppcl"
    magnitude: float = 0.1

    def __post_init__(self):
        if self.magnitude < 0:
            raise InputError(f"{self}: magnitude must be at least 0")

    def on(self, base: FlowObjective, model: ModelConfig) -> Intervals:
        """
        Raises:
          InputError: a model without students, or terms.
        """
        if not model.students:
            raise InputError(
                f"objective {self.kind} trains students, and the model has none: set "
                "config.model.students, e.g. to what ppflow prune found"
            )
        if base.terms:
            raise InputError(f"objective {self.kind} has no terms: leave config.flow.terms out")
        return Intervals(base, self, model.students)

    def notes(self, config: SamplerConfig) -> tuple[str, ...]:
        """Nothing: it is sampled as any model."""
        return ()


@dataclass(frozen=True)
class Intervals(OnFlow):
    """All students of a model, each with its own interval of the model's blocks.

    Training FLOPs are counted as those of the model with its students in place, three times, which
    is too many: most of its blocks are passed once.

    Attributes:
      base: stages and their times, null class, label drop.
      settings: weights.
      students: of the model.
    """

    base: FlowObjective
    settings: Ppcl
    students: tuple[Student, ...]

    def loss(
        self,
        apply: Apply,
        params: Params,
        frozen: Mapping[str, Any],
        batch: Batch,
        draws: Draws,
        weights: Weights,
    ) -> tuple[Float[Array, ""], Metrics]:
        """The sum over students, `loss`; each is logged as `student/STAGE.PLACE` too."""
        given = (params, frozen, batch, draws)
        _, found = self.base.predicted(functools.partial(self._pairs, apply), *given)
        each = {}
        for output in found:
            for student, (ours, theirs) in output.taps.items():
                near = normalised_l1 if student.ffn else direction_loss
                value = jnp.mean(near(ours, theirs))
                if self.settings.magnitude:
                    value += self.settings.magnitude * jnp.mean(magnitude_loss(ours, theirs))
                each[f"student/{str(student).replace(':', '.')}"] = value
        total = jnp.sum(jnp.stack(list(each.values())))
        return total, {"loss": total} | each

    def _pairs(
        self, apply: Apply, params: Params, xt: Any, t: Any, y: Any, stages: tuple[int, ...]
    ) -> tuple[Output, ...]:
        """Of every stage, with pairs by student as its taps, from one pass of the teacher."""
        found = []
        for given in zip(xt, t, y, stages):
            trunk = functools.partial(beside, params[STUDENTS], self.students, given[-1])
            prediction, pairs = apply(params, *given, trunk=trunk, on=())
            found.append(Output(prediction, {}, pairs))
        return tuple(found)


def beside(
    own: Params,
    students: tuple[Student, ...],
    stage: int,
    blocks: Block,
    h: Float[Array, "b n d"],
    c: Float[Array, "b d"],
) -> tuple[Float[Array, "b n d"], dict[Student, Pair]]:
    """The trunk of the teacher up to the last student of a stage, and what its students make.

    What the tokens are after all blocks is not computed.

    Args:
      own: leaves of all students.
      blocks: with an axis of depth; so `models.network.Trunk`.
    """
    here = [s for s in students if s.stage == stage]
    graph = nnx.split(blocks)[0]
    edges = sorted({0, *(s.first for s in here), *(s.last + 1 for s in here)})
    at = {0: h}
    for first, last in itertools.pairwise(edges):
        run = jax.tree.map(lambda leaf, a=first, b=last: leaf[a:b], blocks)
        h = jax.lax.scan(lambda h, block: (block(h, c), None), h, run)[0]
        at[last] = h
    at, c = jax.lax.stop_gradient((at, c))
    pairs = {}
    for i, student in enumerate(blocks_of(students)):
        if student in here:
            block = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], own["blocks"]))
            pairs[student] = block(at[student.first], c), at[student.last + 1]
    for i, student in enumerate(ffns_of(students)):
        if student in here:
            block = jax.tree.map(lambda leaf, s=student: leaf[s.first], blocks)
            into, out = jax.lax.stop_gradient(ffn_pair(block, at[student.first], c))
            kernel, bias = (own["residual"][name][i] for name in ("kernel", "bias"))
            pairs[student] = into @ kernel + bias[None, None] + into, out
    return h, pairs


def ffn_pair(
    block: Block, x: Float[Array, "b n d"], c: Float[Array, "b d"]
) -> tuple[Float[Array, "b n d"], Float[Array, "b n d"]]:
    """What enters the FFN of a block that `x` enters, and what leaves it before its gate."""
    shift1, scale1, gate1, shift2, scale2, _ = block.modulation(c)
    x = x + gate1[:, None] * block.mix(modulate(x, shift1, scale1))
    into = modulate(x, shift2, scale2)
    return into, block.mlp(into).astype(jnp.float32)


def _norm(x: Float[Array, "... d"]) -> Float[Array, "... 1"]:
    # of a token that is exactly zero the gradient is zero
    squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny)) + EPSILON


def _direction(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    return x.astype(jnp.float32) / _norm(x)


def direction_loss(
    ours: Float[Array, "... d"], theirs: Float[Array, "... d"]
) -> Float[Array, " ..."]:
    """sum_d (s / |s| - t / |t|)^2, which is 2 - 2 cos, of every token."""
    return jnp.sum(jnp.square(_direction(ours) - _direction(theirs)), axis=-1)


def normalised_l1(
    ours: Float[Array, "... d"], theirs: Float[Array, "... d"]
) -> Float[Array, " ..."]:
    """sum_d |s_d / |s| - t_d / |t|| of every token."""
    return jnp.sum(jnp.abs(_direction(ours) - _direction(theirs)), axis=-1)


def magnitude_loss(
    ours: Float[Array, "... d"], theirs: Float[Array, "... d"]
) -> Float[Array, " ..."]:
    """(log |s| - log |t|)^2 of every token."""
    return jnp.square(jnp.log(_norm(ours)) - jnp.log(_norm(theirs)))[..., 0]


def check_trained(objective: Any, model: ModelConfig, patterns: tuple[str, ...]) -> None:
    """
    Raises:
      InputError: `objective` is of students, and others than their leaves are to be trained.
    """
    if not isinstance(objective, Intervals):
        return
    trained = leaves(split(abstract_params(model), patterns)[0])
    if any(path[0] != STUDENTS for path, _ in trained):
        raise InputError(
            f"objective {Ppcl.kind} trains students alone, whose teacher the other blocks are: set "
            f"config.train.trainable to {TRAINABLE}, not {patterns}"
        )
