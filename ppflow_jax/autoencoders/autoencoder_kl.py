"""The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, sec. 3.1, app. G).

Encoder: conv, levels of (residual blocks, stride-2 conv), residual - attention - residual, conv to
the moments of a diagonal Gaussian. Decoder: the mirror image, one residual block more per level.
The architecture of `sd-vae-ft-ema` and `sd-vae-ft-mse`: 83,653,863 parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError
from ppflow_jax.models.conv import conv, upsample_nearest

# Fields of a diffusers config.json that this module implements with one value only.
_FIXED = {
    "act_fn": ("silu",),
    "shift_factor": (None, 0, 0.0),
    "latents_mean": (None,),
    "latents_std": (None,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
}


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """Architecture and latent scale; the defaults are Stable Diffusion 1.x (8x, 4 channels).

    Raises `InputError` where the channels cannot be grouped for normalisation.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        odd = [c for c in self.block_out_channels if c % self.norm_num_groups]
        if not self.block_out_channels or odd:
            raise InputError(
                f"block_out_channels={self.block_out_channels} must not be empty and must be "
                f"divisible by norm_num_groups={self.norm_num_groups}; the number of groups "
                "cannot be read from weights: give the config.json that came with them"
            )

    @property
    def downsample(self) -> int:
        """Image pixels per latent position along each axis."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> AutoencoderKLConfig:
        """Read the content of a diffusers `config.json`.

        Raises `InputError` naming every setting that is outside the SD-VAE family.
        """
        bad = [
            f"{key}={config[key]!r} (supported: {allowed[0]!r})"
            for key, allowed in _FIXED.items()
            if key in config and config[key] not in allowed
        ]
        for key, block in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            if set(config.get(key, [block])) != {block}:
                bad.append(f"{key}={config[key]!r} (supported: {block!r} only)")
        if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            bad.append(f"_class_name={config['_class_name']!r} (supported: 'AutoencoderKL')")
        if bad:
            raise InputError("this config is not of the SD-VAE family: " + "; ".join(bad))
        # Written out because the defaults of diffusers are not those of Stable Diffusion.
        return cls(
            in_channels=config.get("in_channels", 3),
            out_channels=config.get("out_channels", 3),
            block_out_channels=tuple(config.get("block_out_channels", (64,))),
            layers_per_block=config.get("layers_per_block", 1),
            latent_channels=config.get("latent_channels", 4),
            norm_num_groups=config.get("norm_num_groups", 32),
            scaling_factor=config.get("scaling_factor", 0.18215),
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The content of the diffusers `config.json` of this architecture."""
        levels = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            **dataclasses.asdict(self),
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "act_fn": "silu",
        }


class _Block(nnx.Module):
    """What every part carries: the config's group count and the compute dtype."""

    def __init__(self, config: AutoencoderKLConfig, dtype: str, rngs: nnx.Rngs):
        self._groups = config.norm_num_groups
        self._dtype = dtype
        self._last = len(config.block_out_channels) - 1

    def _norm(self, channels: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
        # Two-pass variance: E[x^2] - E[x]^2 cancels in float32 where the mean is large.
        return nnx.GroupNorm(
            channels,
            self._groups,
            epsilon=1e-6,
            dtype=jnp.dtype(self._dtype),
            use_fast_variance=False,
            rngs=rngs,
        )

    def _conv(self, n_in: int, n_out: int, kernel: int = 3, *, rngs, **kwargs) -> nnx.Conv:
        return conv(n_in, n_out, kernel, dtype=self._dtype, rngs=rngs, **kwargs)


class ResnetBlock(_Block):
    """x + conv(silu(norm(conv(silu(norm(x)))))), a 1x1 conv on x where the width changes."""

    def __init__(self, config, n_in: int, n_out: int, *, dtype: str, rngs: nnx.Rngs):
        super().__init__(config, dtype, rngs)
        self.norm1 = self._norm(n_in, rngs)
        self.conv1 = self._conv(n_in, n_out, rngs=rngs)
        self.norm2 = self._norm(n_out, rngs)
        self.conv2 = self._conv(n_out, n_out, rngs=rngs)
        self.shortcut = self._conv(n_in, n_out, 1, rngs=rngs) if n_in != n_out else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return (x if self.shortcut is None else self.shortcut(x)) + h


class Attention(_Block):
    """Single-head self-attention over all positions, x + out(softmax(q k' / sqrt(c)) v)."""

    def __init__(self, config, channels: int, *, dtype: str, rngs: nnx.Rngs):
        super().__init__(config, dtype, rngs)
        self.norm = self._norm(channels, rngs)
        for name in ("query", "key", "value", "out"):
            layer = nnx.Linear(channels, channels, dtype=jnp.dtype(dtype), rngs=rngs)
            setattr(self, name, layer)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        tokens = self.norm(x).reshape(b, h * w, c)
        query, key, value = self.query(tokens), self.key(tokens), self.value(tokens)
        logits = jnp.einsum("bqc,bkc->bqk", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits / math.sqrt(c), axis=-1).astype(value.dtype)
        return x + self.out(jnp.einsum("bqk,bkc->bqc", weights, value)).reshape(b, h, w, c)


class MidBlock(_Block):
    """Residual, attention, residual at the lowest resolution."""

    def __init__(self, config, channels: int, *, dtype: str, rngs: nnx.Rngs):
        super().__init__(config, dtype, rngs)
        self.resnet_0 = ResnetBlock(config, channels, channels, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, channels, dtype=dtype, rngs=rngs)
        self.resnet_1 = ResnetBlock(config, channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.resnet_1(self.attention(self.resnet_0(x)))


class Level(_Block):
    """Residual blocks at one resolution, then (except in the last level) the step to the next.

    Attributes are numbered names, not an `nnx.List`: a list gives integer keys, which come back
    from disk as strings and sort differently.
    """

    def __init__(
        self, config, n_in: int, n_out: int, depth: int, resample: str | None, *, dtype: str, rngs
    ):
        super().__init__(config, dtype, rngs)
        self._depth = depth
        for j in range(depth):
            block = ResnetBlock(config, n_in if j == 0 else n_out, n_out, dtype=dtype, rngs=rngs)
            setattr(self, f"resnet_{j}", block)
        self._resample = resample
        if resample == "down":
            self.downsample = self._conv(n_out, n_out, stride=2, pad=(0, 1), rngs=rngs)
        elif resample == "up":
            self.upsample = self._conv(n_out, n_out, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b g v d"]:
        for j in range(self._depth):
            x = getattr(self, f"resnet_{j}")(x)
        if self._resample == "down":
            return self.downsample(x)
        return self.upsample(upsample_nearest(x)) if self._resample == "up" else x


class KLEncoder(_Block):
    """Images in [-1, 1] -> mean and standard deviation of the scaled latent."""

    def __init__(self, config: AutoencoderKLConfig, *, dtype: str = "float32", rngs: nnx.Rngs):
        super().__init__(config, dtype, rngs)
        self._scale = config.scaling_factor
        widths = config.block_out_channels
        moments = 2 * config.latent_channels
        self.conv_in = self._conv(config.in_channels, widths[0], rngs=rngs)
        for i, (n_in, n_out) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True)):
            resample = "down" if i < self._last else None
            depth = config.layers_per_block
            level = Level(config, n_in, n_out, depth, resample, dtype=dtype, rngs=rngs)
            setattr(self, f"down_{i}", level)
        self.mid = MidBlock(config, widths[-1], dtype=dtype, rngs=rngs)
        self.norm_out = self._norm(widths[-1], rngs)
        self.conv_out = self._conv(widths[-1], moments, rngs=rngs)
        self.quant_conv = self._conv(moments, moments, 1, rngs=rngs)

    def __call__(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b g v z"], Float[Array, "b g v z"]]:
        x = self.conv_in(images)
        for i in range(self._last + 1):
            x = getattr(self, f"down_{i}")(x)
        x = self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))
        mean, logvar = jnp.split(self.quant_conv(x).astype(jnp.float32), 2, axis=-1)
        std = jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0))
        return mean * self._scale, std * self._scale


class KLDecoder(_Block):
    """Scaled latents -> images, nominally in [-1, 1] (not clamped here)."""

    def __init__(self, config: AutoencoderKLConfig, *, dtype: str = "float32", rngs: nnx.Rngs):
        super().__init__(config, dtype, rngs)
        self._scale = config.scaling_factor
        widths = config.block_out_channels[::-1]
        latent = config.latent_channels
        self.post_quant_conv = self._conv(latent, latent, 1, rngs=rngs)
        self.conv_in = self._conv(latent, widths[0], rngs=rngs)
        self.mid = MidBlock(config, widths[0], dtype=dtype, rngs=rngs)
        for i, (n_in, n_out) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True)):
            resample = "up" if i < self._last else None
            depth = config.layers_per_block + 1
            level = Level(config, n_in, n_out, depth, resample, dtype=dtype, rngs=rngs)
            setattr(self, f"up_{i}", level)
        self.norm_out = self._norm(widths[-1], rngs)
        self.conv_out = self._conv(widths[-1], config.out_channels, rngs=rngs)

    def __call__(self, latents: Float[Array, "b g v z"]) -> Float[Array, "b h w c"]:
        x = self.mid(self.conv_in(self.post_quant_conv(latents / self._scale)))
        for i in range(self._last + 1):
            x = getattr(self, f"up_{i}")(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x))).astype(jnp.float32)
