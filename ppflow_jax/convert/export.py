"""Checkpoints back to files of weights, with the names of the PyTorch code."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ppflow_jax.autoencoders.decode import load_autoencoder
from ppflow_jax.checkpoints.card import read_card
from ppflow_jax.checkpoints.weights import stored_weights
from ppflow_jax.console import progress
from ppflow_jax.convert.autoencoder_keys import autoencoder_state
from ppflow_jax.convert.inception_keys import inception_state
from ppflow_jax.convert.keys import position_names, position_values, torch_tensors
from ppflow_jax.convert.load import DTYPES
from ppflow_jax.convert.torch_writer import save_torch_file
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic
from ppflow_jax.files.place import is_object
from ppflow_jax.files.store import find_checkpoint, load_stored, read_json, stored_tree
from ppflow_jax.metrics.networks import load_inception
from ppflow_jax.models.adapters import merge, plain, text


def export(source: str, target: Path, to: str, weights: str | None = None) -> None:
    """Checkpoint of a model or autoencoder -> file with the names of the PyTorch code.

    Args:
      source: folder.
      target: new file.
      to: torch or safetensors.
      weights: see `stored_weights`.

    Raises:
      InputError: not a checkpoint, or a pyramid without a PyTorch layout.
    """
    folder = find_checkpoint(source)
    values = read_json(folder)
    if values.keys() & {"autoencoder", "inception"}:
        if "inception" in values:
            _, params, dtype = load_inception(source)
            state = inception_state(params)
        else:
            kind, _, params, dtype = load_autoencoder(source)
            state = autoencoder_state(kind, params)
        tensors = {k: (lambda v=v: v.astype(_named(dtype))) for k, v in state.items()}
    else:
        card = read_card(folder)
        params = stored_weights(folder, card, weights)
        if card.model.adapters:
            params = merge(card.model, params)
            print(f"adapters {text(card.model.adapters)} merged: the PyTorch code has none")
        tensors = dict(torch_tensors(plain(card.model), params))
        tree = stored_tree(folder)
        abstract = {
            k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in tree.get("positions", {}).items()
        }
        kept = load_stored(folder, {"positions": abstract})["positions"] if abstract else {}
        for stage, name in enumerate(position_names(card.model)):
            found = kept.get(str(stage))
            tensors[name] = lambda s=stage, x=found: (
                position_values(card.model, s) if x is None else x
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    with progress(len(tensors), 0, "tensor", "convert") as bar:

        def counted(make):
            bar.update()
            return make()

        if to == "torch":
            makers = {k: (lambda make=make: counted(make)) for k, make in tensors.items()}
            with atomic(target) if is_object(target) else nullcontext(target) as partial:
                save_torch_file(partial, makers)
        else:
            arrays = {k: counted(make) for k, make in tensors.items()}
            try:
                with atomic(target) as partial:
                    save_file(arrays, partial, metadata={"format": "pt"})
            except SafetensorError as error:
                raise InputError(f"cannot write {target} ({error})") from error
    print(f"{len(tensors)} tensors in {target}")


def _named(dtype: str) -> np.dtype:
    return next(d for d in DTYPES if str(d) == dtype)
