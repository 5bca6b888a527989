"""Pictures from pictures: what a model is told of the image it is to make, computed from it.

A task gives the values of one condition (`models.conditions.Channels`) for every image of a batch,
on the devices, at every visit anew: a pure function of the image and of a key. It is how latent
diffusion is trained for super-resolution and inpainting (arXiv 2112.10752, Sec. 4.4, 4.5), with the
condition in channels beside the noisy latent; super-resolution in latents is also the upsampler of
a cascade whose first model makes the low resolution.

Images are those that the model sees: pixels in [-1, 1], or latents. Grey and edges exist of pixels
only; a model of latents is told their encoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ppflow_jax.errors import InputError
from ppflow_jax.flow.known import KNOWN
from ppflow_jax.models.conditions import Channels
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.parts import Described

LUMA = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601


@dataclass(frozen=True)
class Task(Described):
    """Base of all tasks.

    Attributes:
      condition: name of its condition.
      of_pixels: a model of latents is told the encoding of its values as a picture.

    Raises:
      InputError: a setting out of its range.
    """

    condition: ClassVar[str]
    of_pixels: ClassVar[bool] = False

    def channels(self, model: ModelConfig) -> int:
        """Of its values for a model, where these are not encoded."""
        raise NotImplementedError

    def check(self, model: ModelConfig, space: str) -> None:
        """
        Raises:
          InputError: it cannot be computed from images of this model.
        """

    def __call__(self, x: Float[Array, "b h w c"], key: Key[Array, ""]) -> Float[Array, "b h w k"]:
        """The values for a batch of images."""
        raise NotImplementedError

    def for_model(self, model: ModelConfig, space: str) -> Channels:
        """The condition of a model in `space` (pixels or latents), never dropped in training.

        Raises:
          InputError: see `check`.
        """
        self.check(model, space)
        encoded = self.of_pixels and space == "latents"
        return Channels(self.condition, model.channels if encoded else self.channels(model))


@dataclass(frozen=True)
class SuperResolution(Task):
    """The image at a lower resolution, brought back to its size.

    Attributes:
      factor: of the sides; every pixel is the mean of a square of so many pixels.
      up: `nearest` (repeated) or `bilinear`.
    """

    kind = "super_resolution"
    condition = "low"
    factor: int = 2
    up: str = "nearest"

    def __post_init__(self):
        if self.factor < 2 or self.up not in ("nearest", "bilinear"):
            raise InputError(f"task {self}: factor must be at least 2, up nearest or bilinear")

    def channels(self, model: ModelConfig) -> int:
        return model.channels

    def check(self, model: ModelConfig, space: str) -> None:
        if model.latent_size % self.factor:
            raise InputError(
                f"task {self}: a side of {model.latent_size} cannot be divided by {self.factor}"
            )

    def shrunk(self, x: Float[Array, "b h w c"]) -> Float[Array, "b _ _ c"]:
        """At the lower resolution."""
        b, h, w, c = x.shape
        f = self.factor
        return jnp.mean(x.reshape(b, h // f, f, w // f, f, c), axis=(2, 4))

    def enlarged(self, low: Float[Array, "b g v c"]) -> Float[Array, "b h w c"]:
        """Of an image at the lower resolution: the values of the condition."""
        if self.up == "nearest":
            return low.repeat(self.factor, axis=1).repeat(self.factor, axis=2)
        b, h, w, c = low.shape
        return jax.image.resize(low, (b, h * self.factor, w * self.factor, c), "linear")

    def __call__(self, x: Float[Array, "b h w c"], key: Key[Array, ""]) -> Float[Array, "b h w k"]:
        return self.enlarged(self.shrunk(x))


@dataclass(frozen=True)
class Inpainting(Task):
    """What is known of the image: the mask (1: known), and the image times the mask.

    A box is hidden, drawn for every image and visit: its sides are uniform from `least` to `most`
    of the image's, in whole pixels, and so is its place.
    """

    kind = "inpainting"
    condition = KNOWN
    least: float = 0.25
    most: float = 0.75

    def __post_init__(self):
        if not 0 < self.least <= self.most <= 1:
            raise InputError(f"task {self}: it must be 0 < least <= most <= 1")

    def channels(self, model: ModelConfig) -> int:
        return 1 + model.channels

    def masks(self, key: Key[Array, ""], b: int, sides: tuple[int, int]) -> Float[Array, "b h w 1"]:
        """1 outside of a box, 0 inside."""
        inside = []
        for u, side in zip(jax.random.uniform(key, (2, 2, b)), sides):
            low = max(1, round(self.least * side))
            count = low + jnp.floor(u[0] * (max(low, round(self.most * side)) - low + 1))
            first = jnp.floor(u[1] * (side - count + 1))[:, None]
            place = jnp.arange(side)[None]
            inside.append((place >= first) & (place < first + count[:, None]))
        rows, columns = inside
        return 1.0 - (rows[:, :, None, None] & columns[:, None, :, None])

    def masked(
        self, x: Float[Array, "b h w c"], mask: Float[Array, "b h w 1"]
    ) -> Float[Array, "b h w k"]:
        """The values of the condition."""
        return jnp.concatenate([mask, x * mask], axis=-1)

    def __call__(self, x: Float[Array, "b h w c"], key: Key[Array, ""]) -> Float[Array, "b h w k"]:
        return self.masked(x, self.masks(key, len(x), x.shape[1:3]))


@dataclass(frozen=True)
class Colourisation(Task):
    """The luma of a picture."""

    kind = "colourisation"
    condition = "grey"
    of_pixels = True

    def channels(self, model: ModelConfig) -> int:
        return 1

    def check(self, model: ModelConfig, space: str) -> None:
        if space == "pixels" and model.channels != 3:
            raise InputError(
                f"task {self}: pictures of {model.channels} channel(s) have no colours"
            )

    def __call__(self, x: Float[Array, "b h w c"], key: Key[Array, ""]) -> Float[Array, "b h w k"]:
        return luma(x)


@dataclass(frozen=True)
class Edges(Task):
    """The magnitude of the gradient of luma by Sobel's operator, in [-1, 1].

    A step from black to white along an axis has 1, a plain surface -1. Beyond the border the
    picture goes on with its last row and column.

    Attributes:
      threshold: 0, or magnitudes of at least this share of such a step become 1 and others -1.
    """

    kind = "edges"
    condition = "edges"
    of_pixels = True
    threshold: float = 0.0

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise InputError(f"task {self}: threshold must be in [0, 1]")

    def channels(self, model: ModelConfig) -> int:
        return 1

    def check(self, model: ModelConfig, space: str) -> None:
        if space == "pixels" and model.channels not in (1, 3):
            raise InputError(f"task {self}: pictures have 1 or 3 channels, not {model.channels}")

    def __call__(self, x: Float[Array, "b h w c"], key: Key[Array, ""]) -> Float[Array, "b h w k"]:
        grey = luma(x) if x.shape[-1] == 3 else x
        padded = jnp.pad(grey, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        smooth = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
        across = smooth[:, :, 2:] - smooth[:, :, :-2]
        smooth = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
        down = smooth[:, 2:] - smooth[:, :-2]
        share = jnp.minimum(jnp.sqrt(across**2 + down**2) / 8, 1)  # a step of 2 has 8
        if self.threshold:
            share = (share >= self.threshold).astype(jnp.float32)
        return 2 * share - 1


def luma(x: Float[Array, "b h w 3"]) -> Float[Array, "b h w 1"]:
    """Brightness of pixels, in their own range."""
    return jnp.sum(x * jnp.float32(LUMA)[None, None, None], axis=-1, keepdims=True)
