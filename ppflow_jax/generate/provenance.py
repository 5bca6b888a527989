"""What a card beside images says of how they were made."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from ppflow_jax.autoencoders.decode import kind_and_folder
from ppflow_jax.checkpoints.card import Card
from ppflow_jax.checkpoints.weights import Weights
from ppflow_jax.files.store import digest
from ppflow_jax.generate.plan import Plan

ROUNDING = "clamp(127.5 x + 128, 0, 255), truncated"
_PACKAGES = ("ppflow_jax", "jax", "jaxlib", "flax", "diffrax", "numpy", "orbax-checkpoint")


def made_from(weights: Weights, plan: Plan) -> dict[str, Any]:
    """Settings of weights and sampler that images depend on, as JSON values.

    Raises:
      InputError: a checkpoint without checksums.
    """
    pyramid = plan.model.pyramid
    tuned = {} if plan.tuned is None else {"plan_sha256": plan.tuned.sha256}
    return {
        "checkpoint_sha256": digest(weights.path),
        "weights": weights.which,
        "pyramid": str(pyramid),
        **asdict(plan.config),
        "cfg": plan.config.scales(pyramid),
        **tuned,
    }


def decoded_by(decode: str) -> dict[str, Any]:
    """Settings of `--decode=KIND:DIR`, checked by `Decoder.parse` before."""
    if decode == "none":
        return {"decode": "none", "autoencoder_sha256": None}
    kind, folder = kind_and_folder(decode, "--decode")
    return {"decode": kind, "autoencoder_sha256": digest(folder)}


def origin(checkpoint: Path, card: Card) -> dict[str, Any]:
    """Where images came from, beyond what they depend on."""
    return {
        "checkpoint": str(checkpoint),
        "model": card.model.to_json(),
        "flow": asdict(card.flow),
        "space": card.space,
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "versions": versions(_PACKAGES),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python and of `packages`."""
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"
