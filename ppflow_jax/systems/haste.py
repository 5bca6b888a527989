"""HASTE (arXiv 2505.16792): REPA and attention maps of the teacher, until a step at which both end.

The term here is that of the attention: the cross entropy of the teacher's attention and the
student's, for every query over all keys. Student layers are paired with layers of the teacher, and
head i with head i as far as both have one. The end is a phase of `config.train.phases`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError
from ppflow_jax.flow.terms import View
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Output
from ppflow_jax.models.stack import Taps
from ppflow_jax.systems.repa import shares


@dataclass(frozen=True)
class AttentionAlign:
    """The term.

    Attributes:
      layers: of the student, counted from 0.
      teacher: for each of them an entry of the field's axis of layers.
      field: of the batch: logits of the teacher's attention before the softmax, without the class
        token, [b, layers, heads, n, n] with n the tokens of a square grid; any float dtype.

    Raises:
      InputError: not one entry of the teacher for every layer, or none.
    """

    layers: tuple[int, ...] = (4, 5, 6, 7)
    teacher: tuple[int, ...] = (0, 1, 2, 3)
    field: str = "teacher_attention"

    name = "haste"

    def __post_init__(self):
        if not self.layers or len(self.layers) != len(self.teacher):
            raise InputError(
                f"haste: layers {self.layers} and teacher {self.teacher} must have one entry "
                "for each pair of layers"
            )
        if min(*self.layers, *self.teacher) < 0 or len(set(self.layers)) != len(self.layers):
            raise InputError(f"haste: layers must be different and at least 0, got {self}")

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field,)

    @property
    def taps(self) -> Taps:
        return Taps(logits=self.layers)

    def init(self, model: ModelConfig, key: Array) -> dict[str, Any]:
        """Nothing is learned here.

        Raises:
          InputError: the model does not have one of the layers.
        """
        if max(self.layers) >= model.depth:
            raise InputError(
                f"haste: layer {max(self.layers)} of a model with {model.depth} blocks: choose "
                f"0 to {model.depth - 1}"
            )
        return {}

    def __call__(self, own: Mapping[str, Any], out: Output, view: View) -> Float[Array, " b"]:
        """Not less than the entropy of the teacher's attention.

        Raises:
          InputError: a field of another shape.
        """
        teacher = view.batch[self.field]
        shape = teacher.shape[1:]
        square = len(shape) == 4 and math.isqrt(shape[3]) ** 2 == shape[2] == shape[3]
        if not square or shape[0] <= max(self.teacher):
            raise InputError(
                f"haste: field {self.field} has shape {shape} for an example, expected (layers, "
                f"heads, n, n) with at least {max(self.teacher) + 1} layers and n the tokens of a "
                "square grid, without a class token"
            )
        losses = [
            cross_entropy(out.taps[f"logits/{ours}"], attention(teacher[:, theirs], view.grid))
            for ours, theirs in zip(self.layers, self.teacher)
        ]
        return sum(losses) / len(losses)


def cross_entropy(
    student: Float[Array, "b h q k"], teacher: Float[Array, "b t q k"]
) -> Float[Array, " b"]:
    """-sum_k T_k log softmax(S)_k, mean over the heads that both have and over queries.

    Args:
      student: logits.
      teacher: probabilities; nothing flows into them.
    """
    heads = min(student.shape[1], teacher.shape[1])
    log_s = jax.nn.log_softmax(student[:, :heads].astype(jnp.float32), axis=-1)
    target = jax.lax.stop_gradient(teacher[:, :heads])
    return -jnp.mean(jnp.sum(target * log_s, axis=-1), axis=(1, 2))


def attention(logits: Float[Array, "b h n n"], grid: tuple[int, int]) -> Float[Array, "b h m m"]:
    """The teacher's attention between the cells of a grid (rows, columns), in float32.

    Softmax over the teacher's keys, mean over the queries in a cell, sum over the keys in a cell:
    rows sum to 1. Where cells cut tokens of the teacher, these count by their area; a cell inside a
    token has the token's row, and shares its probability with the other cells in it.
    """
    side = math.isqrt(logits.shape[-1])
    maps = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    if grid == (side, side):
        return maps
    cells = np.kron(shares(grid[0], side), shares(grid[1], side))
    keys = cells * np.float32(side * side / math.prod(grid))
    return jnp.einsum("Qq,bhqk,Kk->bhQK", jnp.asarray(cells), maps, jnp.asarray(keys))
