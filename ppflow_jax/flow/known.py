"""Parts of an image that are known, put in their place while the rest is sampled.

Before a step from time t the known part of the state becomes that of the path from the image's own
noise to the known values (imputation of arXiv 2011.13456, App. I.2, on the flow's path). What is
known is the values of a condition: the mask (1: known) and the image times the mask.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import Path, interpolate
from ppflow_jax.models.config import ModelConfig

KNOWN = "known"  # name of the condition
KEEPS = ("end", "steps")


def check_keep(keep: str | None, model: ModelConfig) -> None:
    """
    Raises:
      InputError: a model that is not told what is known.
    """
    channels = {c.name: c.shape(model)[-1] for c in model.conditions if c.enters == "input"}
    if keep and channels.get(KNOWN) != 1 + model.channels:
        raise InputError(
            f"keep={keep} needs a model for inpainting, with a condition {KNOWN} of "
            f"{1 + model.channels} channels: leave it out"
        )


def pasted(x: Float[Array, "b h w c"], known: Float[Array, "b h w k"]) -> Float[Array, "b h w c"]:
    """Images with the known part in its place."""
    return jnp.where(known[..., :1] > 0, known[..., 1:], x)


def pasted_at(
    path: Path,
    x: Float[Array, "b h w c"],
    known: Float[Array, "b h w k"],
    noise: Float[Array, "b h w c"],
    t: Float[Array, ""],
) -> Float[Array, "b h w c"]:
    """States of time t with the known part of the path in its place."""
    values, _ = interpolate(path, noise, known[..., 1:], jnp.full(x.shape[:1], t))
    return jnp.where(known[..., :1] > 0, values, x)
