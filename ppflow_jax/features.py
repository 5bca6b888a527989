"""Networks that turn pictures into features, on disk: the Inception of FID.

It lies in the folders of a checkpoint (see checkpoint.py): `state` is its parameters, and `config`
says which parts it has.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ppflow_jax.checkpoint import find_checkpoint, load_stored, read_json, write_checkpoint
from ppflow_jax.errors import InputError
from ppflow_jax.models.inception import Inception, InceptionConfig, Params


def save_inception(target: str | Path, config: InceptionConfig, params: Params, dtype: str) -> None:
    """A new folder with an Inception network; `dtype` is that of the file it came from.

    Raises:
      InputError: something is there already, or it cannot be written.
    """
    write_checkpoint(target, params, {"inception": {"config": asdict(config), "dtype": dtype}})


def load_inception(path: str | Path) -> tuple[InceptionConfig, Params, str]:
    """Config, float32 parameters and the dtype of the source.

    Raises:
      InputError: not there, not an Inception network, or damaged.
    """
    folder = find_checkpoint(path)
    values = read_json(folder).get("inception")
    if values is None:
        raise InputError(
            f"{path} is no Inception network: make one with python -m ppflow_jax.convert, see "
            "docs/weights.md"
        )
    config = InceptionConfig(**values["config"])
    return config, load_stored(folder, Inception(config).abstract_params()), values["dtype"]
