"""Checkpoints on disk: orbax, with the model's configuration and checksums inside.

    WORKDIR/checkpoints/STEP/{state,config,SHA256SUMS}

`state` is the training state, or only `ema` (and `positions`, see `save_weights`) in a converted
checkpoint; `config` is JSON with the entries `model`, `flow`, `data` and, for a trained one,
`experiment`. A run that trains a part of its weights has only these in its state; `base` then says
which checkpoint has the others. A converted autoencoder or feature network lies in the same
folders: see autoencoders/decode.py and metrics/networks.py.

A checkpoint is written under a temporary name, is given the checksums of its files when all are
there, and is only then renamed. Every reading compares them, so that damage is never used.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ppflow_jax.data.classes import Classes
from ppflow_jax.errors import InputError
from ppflow_jax.files.store import read_json, readable
from ppflow_jax.flow.path import Flow
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.systems.registry import take_block, take_conditions, take_network

ALL = (".*",)
LATENT_SCALE = 0.18215  # of the Stable Diffusion autoencoders, as in SiT and PPFlow


@dataclass(frozen=True)
class Base:
    """The checkpoint, of which another one has what was trained further.

    Attributes:
      path: of its step, when training began.
      sha256: of its content, see `files.store.digest`.
    """

    path: str
    sha256: str


@dataclass(frozen=True)
class Card:
    """What a checkpoint says about itself.

    Attributes:
      model, flow: architecture; path and prediction.
      space: `pixels` (in [-1, 1]) or `latents`.
      experiment: configuration of the training run, if it was trained here.
      latent_scale: what the autoencoder's latents were multiplied by; says nothing for pixels.
      base: what has the weights that were not trained; None: all are here.
    """

    model: ModelConfig
    flow: Flow
    space: str
    experiment: dict[str, Any] | None = None
    latent_scale: float = LATENT_SCALE
    base: Base | None = None

    def to_json(self) -> dict[str, Any]:
        scale = {"latent_scale": self.latent_scale} if self.space == "latents" else {}
        return {
            "model": self.model.to_json(),
            "flow": self.flow.to_json(),
            "data": {"space": self.space} | scale,
            "experiment": self.experiment,
        } | ({"base": asdict(self.base)} if self.base else {})

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Card:
        model = dict(values["model"])
        block, conditions = take_block(model), take_conditions(model)
        network = take_network(model)
        return cls(
            ModelConfig.from_json(model, block, conditions, network),
            Flow(**values["flow"]),
            values["data"]["space"],
            values.get("experiment"),
            values["data"].get("latent_scale", LATENT_SCALE),
            Base(**values["base"]) if "base" in values else None,
        )

    @property
    def trainable(self) -> tuple[str, ...]:
        """Patterns of the leaves that are trained and in the state, see `models.trees.split`."""
        return tuple((self.experiment or {}).get("train", {}).get("trainable", ALL))

    @property
    def alone(self) -> Card:
        """Of the same weights, all in one place, without the run that made them."""
        return replace(self, experiment=None, base=None)

    @property
    def classes(self) -> Classes:
        """Labels and class names of what the model was trained on, as far as they are known."""
        labels = ((self.experiment or {}).get("trained_on") or {}).get("labels")
        return Classes.from_json(labels) if labels else Classes()

    def differences(self, other: Card) -> str:
        """Settings of model and flow that differ, as `name: ours -> theirs`."""
        ours = self.model.to_json() | self.flow.to_json()
        theirs = other.model.to_json() | other.flow.to_json()
        pairs = {k: (ours.get(k, "none"), theirs.get(k, "none")) for k in ours | theirs}
        return ", ".join(f"{k}: {a} -> {b}" for k, (a, b) in pairs.items() if a != b)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"model.width": 128, ...}."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def read_card(path: Path) -> Card:
    """Model, flow and data of the checkpoint at `path` (the folder of one step).

    Raises:
      InputError: missing or unreadable.
    """
    values = read_json(path)
    if "autoencoder" in values:
        raise InputError(
            f"{path} holds an autoencoder: give it as --decode of sample, and a model here"
        )
    if "inception" in values:
        raise InputError(f"{path} holds an Inception network, for metrics: give a model here")
    with readable(path):
        return Card.from_json(values)
