"""The moving average of the parameters: its rate, and what it still holds of the first ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.checkpoints.card import Card
from ppflow_jax.files.store import load_stored, stored_tree

TOO_MUCH = 0.05  # of the initial weights, in an average that is sampled from


def rate(ema: float, warmup: bool, step: jax.Array) -> jax.Array | float:
    """Share of the new parameters in the average, after `step` earlier updates.

    1 - `ema`; with warm-up 1 - min(`ema`, (1 + step) / (10 + step)), as in TensorFlow's
    ExponentialMovingAverage, so that a short run is not mostly its initial weights.
    """
    return jnp.maximum(1 - ema, 9 / (10 + step)) if warmup else 1 - ema


def initial_share(ema: float, warmup: bool, steps: int) -> float:
    """Weight of the initial parameters in the average after `steps` updates, from 0 to 1."""
    if not warmup:
        return ema**steps
    return float(np.prod(1 - np.maximum(1 - ema, 9 / (10 + np.arange(steps)))))


def reminder(experiment: dict[str, Any], step: int) -> str | None:
    """A line about an average that is still too much of the weights that its run began with."""
    train = experiment["train"]
    share = initial_share(train["ema"], train.get("ema_warmup", False), step)
    if share <= TOO_MUCH:
        return None
    return (
        f"at step {step} the EMA is still {share:.0%} the weights that the run began with "
        f"(config.train.ema={train['ema']}): sample with --weights=params, train longer, or take "
        "a smaller config.train.ema"
    )


def reminder_of(folder: Path, card: Card) -> str | None:
    """`reminder` of the checkpoint in `folder`; None for one that was not trained here.

    Raises:
      InputError: the checkpoint is damaged.
    """
    if card.experiment is None:
        return None
    if folder.name.isdigit():
        return reminder(card.experiment, int(folder.name))
    stored = load_stored(folder, {"step": stored_tree(folder)["step"]})  # a copy with a new name
    return reminder(card.experiment, int(stored["step"]))
