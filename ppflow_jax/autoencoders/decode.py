"""From latents to pictures: autoencoders on disk, and what `--decode` names.

An autoencoder lies in the folders of a checkpoint (see files/store.py): `state` is its parameters
`{"encoder": ..., "decoder": ...}`, of which one may be absent, and `config` says which it is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from ppflow_jax.autoencoders.autoencoder import Autoencoder, Config, Params, decode_chunked
from ppflow_jax.autoencoders.autoencoder_kl import AutoencoderKLConfig
from ppflow_jax.autoencoders.taesd import TAESDConfig
from ppflow_jax.checkpoints.card import LATENT_SCALE, Card
from ppflow_jax.data.save import to_uint8
from ppflow_jax.devices.sharding import batch_sharding, data_shards, replicated
from ppflow_jax.errors import InputError
from ppflow_jax.files.store import (
    find_checkpoint,
    load_stored,
    read_json,
    stored_tree,
    write_checkpoint,
)

KINDS = {"vae": AutoencoderKLConfig, "taesd": TAESDConfig}
CHUNK = 16


def save_autoencoder(target: str | Path, kind: str, config: Config, params: Params, dtype: str):
    """A new folder with an autoencoder; `dtype` is that of the file it came from.

    Raises:
      InputError: something is there already, or it cannot be written.
    """
    values = {"autoencoder": {"kind": kind, "config": asdict(config), "dtype": dtype}}
    write_checkpoint(target, params, values)


def load_autoencoder(
    path: str | Path, halves: tuple[str, ...] | None = None
) -> tuple[str, Config, Params, str]:
    """Kind, config, float32 parameters (of all or some halves) and the dtype of the source.

    Raises:
      InputError: not there, not an autoencoder, damaged, or without one of `halves`.
    """
    folder = find_checkpoint(path)
    values = read_json(folder).get("autoencoder")
    if values is None or values.get("kind") not in KINDS:
        raise InputError(
            f"{path} is no autoencoder: make one with python -m ppflow_jax.convert from the file "
            "of an AutoencoderKL or TAESD"
        )
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in values["config"].items()}
    config = KINDS[values["kind"]](**settings)
    found = stored_tree(folder)
    halves = halves or tuple(found)
    if missing := [half for half in halves if half not in found]:
        raise InputError(
            f"{path} has no {' and no '.join(missing)}: convert the files of both halves"
        )
    abstract = Autoencoder(config).abstract_params()
    params = load_stored(folder, {half: abstract[half] for half in halves})
    return values["kind"], config, params, values["dtype"]


def kind_and_folder(text: str, flag: str, others: str = "") -> tuple[str, str]:
    """What `vae:DIR` or `taesd:DIR` says; `others` are further values of the `flag`.

    Raises:
      InputError: not of that form.
    """
    kind, _, folder = text.partition(":")
    if kind not in KINDS or not folder:
        raise InputError(
            f"{flag}={text}: write {others}vae:DIR or taesd:DIR, a converted autoencoder"
        )
    return kind, folder


@dataclass(frozen=True)
class Decoder:
    """The pictures of a model's outputs: through an autoencoder, or false colours without one."""

    card: Card
    autoencoder: Autoencoder | None = None
    params: Any = None
    factor: float = 1.0
    mesh: Mesh | None = None

    @classmethod
    def parse(cls, text: str, card: Card) -> Decoder:
        """From `none`, `vae:DIR` or `taesd:DIR`; loads the decoder's parameters.

        Raises:
          InputError: not of that form, or an autoencoder that does not fit the model.
        """
        if text == "none":
            return cls(card)
        kind, folder = kind_and_folder(text, "--decode", "none, ")
        if card.space != "latents":
            raise InputError(f"--decode={text}: this model makes pixels, not latents; use none")
        found, config, params, _ = load_autoencoder(folder, ("decoder",))
        if found != kind:
            raise InputError(
                f"--decode={text}: that folder holds a {found}; write {found}:{folder}"
            )
        if config.latent_channels != card.model.channels:
            raise InputError(
                f"--decode={text} decodes {config.latent_channels} channels, the model makes "
                f"{card.model.channels}: use the autoencoder that the model was trained with"
            )
        # Each autoencoder takes latents at its own scale; TAESD's is that of Stable Diffusion.
        scale = getattr(config, "scaling_factor", LATENT_SCALE)
        return cls(card, Autoencoder(config), jax.device_put(params), scale / card.latent_scale)

    def on(self, mesh: Mesh) -> Decoder:
        """The same with its parameters on every device of `mesh`, for decoding on all of them."""
        return replace(self, params=jax.device_put(self.params, replicated(mesh)), mesh=mesh)

    def pictures(
        self, latents: Float[np.ndarray, "b h w c"], chunk: int = CHUNK
    ) -> UInt8[np.ndarray, "b y x k"]:
        """The pictures in order; a device decodes `chunk` at a time, whatever their number."""
        if self.autoencoder is None:
            return to_uint8(latents, self.card.space)
        latents = np.float32(latents * self.factor)
        if self.mesh is not None:
            chunk *= data_shards(self.mesh)
        sharding = batch_sharding(self.mesh) if self.mesh is not None else None
        return decode_chunked(
            self.autoencoder, self.params, latents, chunk=chunk, uint8=True, sharding=sharding
        )
