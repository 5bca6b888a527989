"""A run that starts from weights is of their architecture."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ml_collections import ConfigDict

from ppflow_jax.checkpoints.card import read_card
from ppflow_jax.checkpoints.run import latest_card
from ppflow_jax.files.store import find_checkpoint


def take_architecture(config: ConfigDict, workdir: str | None, told: Collection[str]) -> str | None:
    """Give `config.model` the sizes of the weights in `config.init_from`, and say which changed.

    The pyramid stays, because another one is another experiment, and so does what was `told` on the
    command line, as `config.model.width`: both must fit the weights. A run that is in `workdir`
    already has the architecture it began with, also where the weights are gone.

    Raises:
      InputError: no checkpoint in `config.init_from`.
    """
    if not config.init_from:
        return None
    begun = latest_card(Path(workdir)) if workdir and Path(workdir).is_dir() else None
    card = begun[1] if begun else read_card(find_checkpoint(config.init_from))
    changed = []
    for name, value in card.model.to_json().items():
        before = config.model.get(name)
        if name == "pyramid" or f"config.model.{name}" in told or before in (None, value):
            continue
        config.model[name] = value
        changed.append(f"{name} {value} (not {before})")
    return f"architecture of {config.init_from}: {', '.join(changed)}" if changed else None
