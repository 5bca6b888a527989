"""A network of a paper in the place of `models.network.PPFlow`.

A backbone is configuration and factory at once, as parts are. It says what differs: which modules,
their FLOPs outside of the blocks, shardings and PyTorch names. What asks for a network
(`models.network`, `models.flops`, `convert.keys`) asks the backbone of a model that has one.

Most are a trunk, one stack of blocks in `params["blocks"]`, with something of their own around it.
One that is not says `trunk = False`: it is called and trained as the others are, and what reaches
into blocks is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from flax import nnx

from ppflow_jax.devices.layout import Layout
from ppflow_jax.devices.sharding import is_stacked
from ppflow_jax.errors import InputError
from ppflow_jax.models.leaves import Described, Key, Matrix, Rule
from ppflow_jax.models.stack import Taps

if TYPE_CHECKING:
    from ppflow_jax.models.config import ModelConfig


@dataclass(frozen=True)
class Backbone(Described):
    """Base of all: frozen dataclasses of numbers, texts, booleans and tuples of numbers.

    Attributes:
      rules: shardings of its leaves, besides those of the parts, see `devices.sharding`.
      matrices: those of its leaves that are linear maps between features, for Muon.
      fixed: patterns of leaves that are no weights: they have no gradient and must not decay.
      trunk: whether the blocks of `model` are one stack, `params["blocks"]`; the names of all
        stacks end with `blocks`.
    """

    rules: ClassVar[tuple[Rule, ...]] = ()
    matrices: ClassVar[tuple[Matrix, ...]] = ()
    fixed: ClassVar[tuple[str, ...]] = ()
    trunk: ClassVar[bool] = True

    def check(self, model: ModelConfig) -> None:
        """
        Raises:
          InputError: a model that it cannot be the network of.
        """

    def check_path(self, path: str) -> None:
        """
        Raises:
          InputError: a path of `flow.path` along which it does not predict.
        """

    def stacks(self, model: ModelConfig) -> tuple[ModelConfig, ...]:
        """Its stacks of blocks, as models of DiT with the same stages, the trunk first."""
        raise NotImplementedError

    def module(self, model: ModelConfig, **options: Any) -> nnx.Module:
        """The network, made and called as `models.network.PPFlow` is, with the same options.

        Without a trunk it has `by_stage(xs, ts, ys, stages)` alone.
        """
        raise NotImplementedError

    def ends_flops(self, model: ModelConfig, stage: int) -> int:
        """FLOPs of one image outside of the trunk, without conditions and adapters.

        Without a trunk, outside of all stacks.
        """
        raise NotImplementedError

    def keys(self, model: ModelConfig) -> Iterator[Key]:
        """PyTorch names of all leaves.

        Raises:
          InputError: a model that has no PyTorch layout.
        """
        raise NotImplementedError

    def tables(self, model: ModelConfig) -> dict[str, np.ndarray]:
        """Fixed arrays of the PyTorch file by name, which are computed here."""
        return {}

    def flow(self, model: ModelConfig) -> dict[str, Any]:
        """Fields of `flow.path.Flow` that public weights have, where they are not the defaults."""
        return {}

    @classmethod
    def read(
        cls, state: Mapping[str, Any], model: dict[str, Any], said: Backbone | None
    ) -> Backbone | None:
        """The backbone of a PyTorch state dict, if it is this one.

        Args:
          model: is given the fields of `ModelConfig` that it knows, `width` and `depth` at least;
            without a trunk all but `latent_size`.
          said: what a person says that it is, where the file does not tell.

        Raises:
          InputError: something that is needed is not in the file.
        """
        raise NotImplementedError


def whole(network: Backbone, graphdef: Any, layout: Layout) -> Callable[..., Any]:
    """`models.network.make_apply` of a network without a trunk."""

    def apply(params, x, t, y, stage, trunk=None, taps=Taps(), mixer=None):
        if trunk is not None or taps or mixer is not None:
            raise InputError(
                f"{network.kind} is not one stack of transformer blocks: nothing can be read from "
                "or put into its blocks"
            )
        here = {name: part for name, part in params.items() if not is_stacked(name)}
        module: Any = nnx.merge(graphdef, params | layout.weights(here, ""))
        if isinstance(stage, tuple):
            return module.by_stage(x, t, y, stage)
        return module.by_stage((x,), (t,), (y,), (stage,))[0].prediction

    return apply
