"""Weights of a model in a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from ppflow_jax.checkpoints.card import Card, read_card
from ppflow_jax.devices.sharding import local_mesh, tree_shardings
from ppflow_jax.files.store import find_checkpoint, readable, verify, write_checkpoint
from ppflow_jax.models.network import Params, abstract_params


@dataclass(frozen=True, eq=False)
class Weights:
    """Trained weights, loaded on the devices of this process when they are first asked for.

    Attributes:
      card: of the model.
      path: of the checkpoint or file.
      which: `ema`, or `params` as last trained.
      load: gives the parameters.
    """

    card: Card
    path: Path
    which: str
    load: Callable[[], Params]

    @functools.cached_property
    def params(self) -> Params:
        """
        Raises:
          InputError: damaged or unreadable.
        """
        return self.load()


def open_weights(path: str | Path, which: str = "ema") -> Weights:
    """Weights of a run (its latest step), one of its steps, or a converted folder.

    Raises:
      InputError: not there, or of another kind.
    """
    folder = find_checkpoint(path)
    card = read_card(folder)
    return Weights(card, folder, which, lambda: load_weights(folder, card, local_mesh(), which))


def load_weights(path: Path, card: Card, mesh: Mesh, which: str = "ema") -> Params:
    """Parameters of the checkpoint at `path`: `ema`, or `params` as last trained.

    All processes call this at once.

    Raises:
      InputError: damaged, unreadable, or not there.
    """
    verify(path, together=True)
    abstract = {which: abstract_params(card.model)}
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        tree_shardings(abstract, mesh, card.model.block.rules),
    )
    with readable(path):
        return ocp.PyTreeCheckpointer().restore(
            path / "state",
            args=ocp.args.PyTreeRestore(
                target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True,
            ),
        )[which]


def save_weights(
    target: str | Path, card: Card, params: Params, positions: Mapping[int, np.ndarray] = {}
) -> None:
    """A checkpoint of step 0 with `params` as its EMA, in the dtypes they have.

    Arrays may be of any floating-point dtype: `load_weights` gives float32. `positions` by stage
    are kept for the way back to PyTorch only.

    Raises:
      InputError: see `check_new`.
    """
    kept = {"positions": {str(k): v for k, v in positions.items()}} if positions else {}
    write_checkpoint(target, {"ema": params} | kept, card.to_json())
