"""From pictures to latents: the autoencoders that `vae` names."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from ppflow_jax.autoencoders.autoencoder import Autoencoder, Config, Params
from ppflow_jax.autoencoders.decode import kind_and_folder, load_autoencoder
from ppflow_jax.checkpoints.card import LATENT_SCALE
from ppflow_jax.devices.sharding import leaf_path
from ppflow_jax.errors import InputError


@dataclass(frozen=True)
class Encoder:
    """The encoder half of a converted autoencoder; `params` are host arrays, float32."""

    kind: str
    config: Config
    params: Params

    @classmethod
    def parse(cls, text: str, flag: str) -> Encoder:
        """From `vae:DIR` or `taesd:DIR`; `flag` names the setting in messages.

        Raises:
          InputError: not of that form, or no such autoencoder there.
        """
        kind, folder = kind_and_folder(text, flag)
        found, config, params, _ = load_autoencoder(folder, ("encoder",))
        if found != kind:
            raise InputError(f"{flag}={text}: that folder holds a {found}; write {found}:{folder}")
        return cls(kind, config, params)

    @property
    def autoencoder(self) -> Autoencoder:
        return Autoencoder(self.config)

    @property
    def stochastic(self) -> bool:
        """Whether latents have a standard deviation."""
        return hasattr(self.config, "scaling_factor")

    @property
    def latent_scale(self) -> float:
        """What latents were multiplied by; TAESD's are those of Stable Diffusion, scaled."""
        return getattr(self.config, "scaling_factor", LATENT_SCALE)

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(h, w, c) of the latent of a picture of `size` pixels.

        Raises:
          InputError: the size does not divide.
        """
        side, rest = divmod(size, self.config.downsample)
        if rest or side < 1:
            raise InputError(
                f"pictures of {size} pixels cannot be encoded: the size must be a multiple of "
                f"{self.config.downsample}"
            )
        return side, side, self.config.latent_channels

    def identity(self) -> dict[str, Any]:
        """Kind, architecture and SHA-256 of the parameters' paths, shapes and float32 values."""
        digest = hashlib.sha256()
        leaves = jax.tree_util.tree_leaves_with_path(self.params)
        for path, leaf in sorted(leaves, key=lambda item: leaf_path(item[0])):
            digest.update(f"{leaf_path(path)} {leaf.shape}\n".encode())
            digest.update(np.ascontiguousarray(leaf, "<f4"))
        config = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.config).items()}
        return {"kind": self.kind, "config": config, "sha256": digest.hexdigest()}


def to_float(images: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """0..255 to [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def moments(
    autoencoder: Autoencoder, params: Params, images: UInt8[Array, "b h w c"]
) -> tuple[Float[Array, "b g v z"], Float[Array, "b g v z"]]:
    """Mean and standard deviation of the scaled latents, at full float32 precision."""
    with jax.default_matmul_precision("highest"):  # else TPUs round to bfloat16
        return autoencoder.encode(params, to_float(images))
