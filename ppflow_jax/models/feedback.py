"""What a network tells its later blocks of its own tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError
from ppflow_jax.models.conditions import Condition
from ppflow_jax.models.stack import Arrays, Turn

if TYPE_CHECKING:
    from ppflow_jax.models.config import ModelConfig


class Feedback(Condition):
    """A condition that nobody gives: it is made of the tokens in the middle of the stack.

    After some blocks it becomes a vector of every image, which is added to the embeddings of time,
    label and level for the blocks behind and for the final layer.
    """

    enters = "blocks"

    def after(self, model: ModelConfig) -> int:
        """The number of blocks after which it is made."""
        raise NotImplementedError

    def added(self, module: Any, h: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        """Of the tokens there; float32."""
        raise NotImplementedError

    def check(self, model: ModelConfig) -> None:
        """
        Raises:
          InputError: the model has another such condition, or blocks that are told nothing; no
            block before it or behind it.
        """
        others = [c for c in model.conditions if isinstance(c, Feedback) and c != self]
        if others or model.block.norm is not None:
            raise InputError(
                f"condition {self} tells later blocks something, and {others[0]} does too: choose "
                "one"
                if others
                else f"condition {self} tells later blocks something, and the norm "
                f"{model.block.norm} does not let them be told: leave one of both out"
            )
        if not 1 <= self.after(model) < model.depth:
            raise InputError(
                f"condition {self}: it is made after {self.after(model)} of {model.depth} blocks; "
                "there must be a block before it and one behind it"
            )


def turn(model: ModelConfig, modules: Any, vectors: tuple[Float[Array, "_ d"], ...]) -> Turn | None:
    """Where and how the stack changes what blocks are told; None where nothing does.

    Args:
      modules: of the conditions, by name; looked at only where one is a `Feedback`.
      vectors: of every stage, the sum of the embeddings of time, label and level.
    """
    for fed in model.conditions:
        if isinstance(fed, Feedback):
            return fed.after(model), lambda hs, fed=fed: _changed(fed, modules(), vectors, hs)
    return None


def _changed(fed: Feedback, modules: Any, vectors: Arrays, hs: Arrays) -> Arrays:
    return tuple(jax.nn.silu(c + fed.added(modules[fed.name], h)) for c, h in zip(vectors, hs))


def refuse(model: ModelConfig) -> None:
    """
    Raises:
      InputError: a method has its own way through the blocks, and they are told other things behind
        the middle.
    """
    if fed := [c for c in model.conditions if isinstance(c, Feedback)]:
        raise InputError(
            f"what takes blocks apart cannot be used with the condition {fed[0]}, which changes "
            "on the way what they are told: leave it out, or use a model without that condition"
        )
