"""A whole network that is not the transformer of `models.network`.

As a part of a block does, it says all that a model must know of it: leaves, FLOPs, shardings and
PyTorch names. Those of papers are in `systems/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from flax import nnx
from jaxtyping import Array, Float

from ppflow_jax.devices.layout import Layout
from ppflow_jax.errors import InputError
from ppflow_jax.models.conditions import Cond
from ppflow_jax.models.layers import Execution
from ppflow_jax.models.leaves import Described, Key, Matrix, Rule
from ppflow_jax.models.parts import DIT
from ppflow_jax.models.stack import Output, Taps

if TYPE_CHECKING:
    from ppflow_jax.models.config import ModelConfig


class Predictor(Protocol):
    """The module of a backbone. Leaves below a name with `blocks` have a leading axis of depth."""

    def by_stage(
        self,
        xs: tuple[Float[Array, "_ h w c"], ...],
        ts: tuple[Float[Array, " _"], ...],
        ys: tuple[Cond, ...],
        stages: tuple[int, ...],
    ) -> tuple[Float[Array, "_ h w c"], ...]:
        """Predictions of several stages in one pass, see `models.network.make_apply`."""


@dataclass(frozen=True)
class Backbone(Described):
    """Base of all: frozen dataclasses of numbers, texts, booleans and tuples of numbers.

    Attributes:
      rules: shardings of its leaves, see `devices.sharding`.
      matrices: those of its leaves that are linear maps between features, for Muon.
      paths: of `flow.path` along which it may predict; empty: all.
    """

    rules: ClassVar[tuple[Rule, ...]] = ()
    matrices: ClassVar[tuple[Matrix, ...]] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        return ()

    def check(self, model: ModelConfig) -> None:
        """
        Raises:
          InputError: sizes or grids that it cannot have, or what only the transformer has.
        """
        lacks = {
            "ffn, mixer and wrap": model.block != DIT,
            "conditions": bool(model.conditions),
            "adapters": bool(model.adapters),
        }
        if has := next((name for name, there in lacks.items() if there), None):
            raise InputError(
                f"config.model.{has}: these are of the transformer, not of {self.kind}: leave "
                "them out, and config.data.task too, or leave config.model.network=none"
            )

    def stacks(self, model: ModelConfig) -> tuple[ModelConfig, ...]:
        """Its stacks of blocks, as models of the transformer with the same stages."""
        raise NotImplementedError

    def module(self, model: ModelConfig, run: Execution, remat: str, rngs: nnx.Rngs) -> nnx.Module:
        """Its module, a `Predictor`."""
        raise NotImplementedError

    def keys(self, model: ModelConfig) -> Iterator[Key]:
        """PyTorch names of all its leaves.

        Raises:
          InputError: it has no PyTorch layout.
        """
        raise NotImplementedError

    def flops(self, model: ModelConfig, stage: int) -> int:
        """FLOPs of its matrix products and convolutions for one image, 2 per multiply-add."""
        raise NotImplementedError

    @classmethod
    def read(
        cls, state: Mapping[str, Any], latent_size: int | None, path: str
    ) -> ModelConfig | None:
        """The model of a PyTorch state dict, if its names are those of this network.

        Args:
          latent_size: as a person said it; None where nothing was said.
          path: of `flow.path` along which it predicts.

        Raises:
          InputError: what cannot be found in it.
        """
        raise NotImplementedError


def whole(backbone: Backbone, graphdef: Any, layout: Layout) -> Callable[..., Any]:
    """`models.network.make_apply` of a network that has no one stack of blocks."""

    def apply(params, x, t, y, stage, trunk=None, taps=Taps(), mixer=None):
        if trunk is not None or taps or mixer is not None:
            raise InputError(
                f"{backbone.kind} is not a stack of transformer blocks: nothing can be read from "
                "or put into its blocks"
            )
        here = {name: node for name, node in params.items() if "blocks" not in node}
        network: Any = nnx.merge(graphdef, params | layout.weights(here, ""))
        if isinstance(stage, tuple):
            return tuple(Output(p, {}) for p in network.by_stage(x, t, y, stage))
        return network.by_stage((x,), (t,), (y,), (stage,))[0]

    return apply
