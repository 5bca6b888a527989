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

from ppflow_jax.checkpoints.base import find_base, workdir_of
from ppflow_jax.checkpoints.card import Card, read_card
from ppflow_jax.devices.sharding import Rules, local_mesh, tree_shardings
from ppflow_jax.errors import InputError
from ppflow_jax.files.store import (
    find_checkpoint,
    here,
    load_stored,
    readable,
    stored_tree,
    verify,
    write_checkpoint,
)
from ppflow_jax.models.network import Params, abstract_params
from ppflow_jax.models.trees import join, joined, leaves, split

# (folder of a checkpoint, abstract leaves of its state) -> the arrays
Restore = Callable[[Path, Params], Params]


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

    What it leaves to its base is the EMA of that. All processes call this at once.

    Raises:
      InputError: damaged, unreadable, or not there; a base that is not what it was.
    """
    return _gathered(path, card, which, abstract_params(card.model), _onto(mesh, card.model.rules))


def load_frozen(workdir: Path, card: Card, mesh: Mesh) -> Params:
    """`base`, the weights that a run does not train, from its base; nothing where it trains all.

    All processes call this at once.

    Raises:
      InputError: see `load_weights`; the base does not have them.
    """
    frozen = split(abstract_params(card.model), card.trainable)[1]
    if not frozen:
        return {}
    return {"base": _of_base(workdir, card, frozen, _onto(mesh, card.model.rules))}


def stored_weights(path: Path, card: Card, weights: str | None) -> Params:
    """The EMA of a checkpoint, or its raw weights for `model` and `params`, as they are stored.

    Raises:
      InputError: see `load_weights`.
    """
    which = "ema" if weights in (None, "ema") else "params"
    if which not in stored_tree(path):
        raise InputError(f"{path} has no {which!r} weights: change --weights")
    return _gathered(path, card, which, abstract_params(card.model), load_stored)


def _gathered(path: Path, card: Card, which: str, abstract: Params, restore: Restore) -> Params:
    """The leaves that `abstract` has, from the checkpoint at `path` and its base."""
    own, frozen = split(abstract, card.trainable)
    params = restore(path, {which: own})[which] if own else {}
    return join(params, _of_base(workdir_of(path), card, frozen, restore)) if frozen else params


def _of_base(workdir: Path, card: Card, abstract: Params, restore: Restore) -> Params:
    folder = find_base(card.base, workdir)
    found = read_card(folder)
    there = {joined(path): leaf.shape for path, leaf in leaves(abstract_params(found.model))}
    for path, leaf in leaves(abstract):
        if (shape := there.get(joined(path))) != leaf.shape:
            what = "no" if shape is None else f"shape {shape} of"
            raise InputError(
                f"{joined(path)} is not trained, and its base {folder} has {what} {joined(path)}: "
                "add it to config.train.trainable, or start from weights that have it"
            )
    return _gathered(folder, found, "ema", abstract, restore)


def _onto(mesh: Mesh, rules: Rules) -> Restore:
    """Float32 arrays on the devices of a mesh; `rules` are those of the model's own parts."""

    def restore(path: Path, abstract: Params) -> Params:
        verify(path, together=True)
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            tree_shardings(abstract, mesh, rules),
        )
        with readable(path), here(path) as folder:
            return ocp.PyTreeCheckpointer().restore(
                folder / "state",
                args=ocp.args.PyTreeRestore(
                    target,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                    partial_restore=True,
                ),
            )

    return restore


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
