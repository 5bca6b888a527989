"""TAESD, the tiny autoencoder of the Stable Diffusion latent space (Ollin Boer Bohan, MIT).

3x3 convolutions of one width, ReLU, no normalisation, no attention; 1,222,532 parameters in the
encoder and 1,222,531 in the decoder. Its latent is the *scaled* one (what a diffusion model sees)
and has no posterior variance. The networks see images in [0, 1]; here images are in [-1, 1].
"""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float

from ppflow_jax.models.conv import conv, upsample_nearest

STAGES = 3
BLOCKS = 3


@dataclasses.dataclass(frozen=True)
class TAESDConfig:
    """Channels of image, latent and trunk; 8 pixels per latent position."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    width: int = 64

    @property
    def downsample(self) -> int:
        """Image pixels per latent position along each axis."""
        return 2**STAGES


class TinyBlock(nnx.Module):
    """relu(x + conv(relu(conv(relu(conv(x))))))."""

    def __init__(self, width: int, *, dtype: str, rngs: nnx.Rngs):
        self.conv_0 = conv(width, width, dtype=dtype, rngs=rngs)
        self.conv_1 = conv(width, width, dtype=dtype, rngs=rngs)
        self.conv_2 = conv(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        h = jax.nn.relu(self.conv_0(x))
        h = jax.nn.relu(self.conv_1(h))
        return jax.nn.relu(x + self.conv_2(h))


class TinyStage(nnx.Module):
    """Three blocks at one resolution; a bias-free convolution before (down) or after (up) them."""

    def __init__(self, width: int, direction: str, *, dtype: str, rngs: nnx.Rngs):
        self._down = direction == "down"
        stride = 2 if self._down else 1
        self.resample = conv(width, width, stride=stride, use_bias=False, dtype=dtype, rngs=rngs)
        for j in range(BLOCKS):
            setattr(self, f"block_{j}", TinyBlock(width, dtype=dtype, rngs=rngs))

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b g v c"]:
        if self._down:
            x = self.resample(x)
        for j in range(BLOCKS):
            x = getattr(self, f"block_{j}")(x)
        return x if self._down else self.resample(upsample_nearest(x))


class TAESDEncoder(nnx.Module):
    """Images in [-1, 1] -> scaled latent and its standard deviation, which is zero."""

    def __init__(self, config: TAESDConfig, *, dtype: str = "float32", rngs: nnx.Rngs):
        width = config.width
        self.conv_in = conv(config.in_channels, width, dtype=dtype, rngs=rngs)
        self.block_in = TinyBlock(width, dtype=dtype, rngs=rngs)
        for s in range(STAGES):
            setattr(self, f"stage_{s}", TinyStage(width, "down", dtype=dtype, rngs=rngs))
        self.conv_out = conv(width, config.latent_channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b g v z"], Float[Array, "b g v z"]]:
        x = self.block_in(self.conv_in((images + 1.0) / 2.0))
        for s in range(STAGES):
            x = getattr(self, f"stage_{s}")(x)
        mean = self.conv_out(x).astype(jnp.float32)
        return mean, jnp.zeros_like(mean)


class TAESDDecoder(nnx.Module):
    """Scaled latents -> images, nominally in [-1, 1] (not clamped here)."""

    def __init__(self, config: TAESDConfig, *, dtype: str = "float32", rngs: nnx.Rngs):
        width = config.width
        self.conv_in = conv(config.latent_channels, width, dtype=dtype, rngs=rngs)
        for s in range(STAGES):
            setattr(self, f"stage_{s}", TinyStage(width, "up", dtype=dtype, rngs=rngs))
        self.block_out = TinyBlock(width, dtype=dtype, rngs=rngs)
        self.conv_out = conv(width, config.out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, latents: Float[Array, "b g v z"]) -> Float[Array, "b h w c"]:
        x = jax.nn.relu(self.conv_in(3.0 * jnp.tanh(latents / 3.0)))
        for s in range(STAGES):
            x = getattr(self, f"stage_{s}")(x)
        return self.conv_out(self.block_out(x)).astype(jnp.float32) * 2.0 - 1.0
