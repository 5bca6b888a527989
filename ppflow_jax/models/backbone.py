"""A network of a paper in the place of `models.network.PPFlow`.

A backbone is configuration and factory at once, as parts are. It says what differs: which modules,
their FLOPs outside of the blocks, shardings and PyTorch names. What asks for a network
(`models.network`, `models.flops`, `convert.keys`) asks the backbone of a model that has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from flax import nnx

from ppflow_jax.models.leaves import Described, Key, Matrix, Rule

if TYPE_CHECKING:
    from ppflow_jax.models.config import ModelConfig


@dataclass(frozen=True)
class Backbone(Described):
    """Base of all: frozen dataclasses of numbers, texts and booleans.

    Attributes:
      rules: shardings of its leaves, besides those of the parts, see `devices.sharding`.
      matrices: those of its leaves that are linear maps between features, for Muon.
      fixed: patterns of leaves that are no weights: they have no gradient and must not decay.
    """

    rules: ClassVar[tuple[Rule, ...]] = ()
    matrices: ClassVar[tuple[Matrix, ...]] = ()
    fixed: ClassVar[tuple[str, ...]] = ()

    def check(self, model: ModelConfig) -> None:
        """
        Raises:
          InputError: a model that it cannot be the network of.
        """

    def stacks(self, model: ModelConfig) -> tuple[ModelConfig, ...]:
        """Its stacks of blocks, as models of DiT with the same stages, that of `model` first."""
        raise NotImplementedError

    def module(self, model: ModelConfig, **options: Any) -> nnx.Module:
        """The network, called as `models.network.PPFlow` is, with the same options."""
        raise NotImplementedError

    def ends_flops(self, model: ModelConfig, stage: int) -> int:
        """FLOPs of one image outside of the first stack, without conditions and adapters."""
        raise NotImplementedError

    def keys(self, model: ModelConfig) -> Iterator[Key]:
        """PyTorch names of all leaves."""
        raise NotImplementedError

    def tables(self, model: ModelConfig) -> dict[str, np.ndarray]:
        """Fixed arrays of the PyTorch file by name, which are computed here."""
        raise NotImplementedError

    def shift(self, model: ModelConfig) -> float:
        """Of times, of public weights, see `flow.times`."""
        return 1.0

    @classmethod
    def read(
        cls, state: Mapping[str, Any], model: dict[str, Any], said: Backbone | None
    ) -> Backbone | None:
        """The backbone of a PyTorch state dict, if it is this one.

        Args:
          model: is given the fields of `ModelConfig` that it knows, `width` and `depth` at least.
          said: what a person says that it is, where the file does not tell.

        Raises:
          InputError: something that is needed is not in the file.
        """
        raise NotImplementedError
