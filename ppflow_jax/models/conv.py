"""The two image operations that both autoencoders are made of."""

from __future__ import annotations

from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float


def conv(
    in_channels: int,
    out_channels: int,
    kernel: int = 3,
    *,
    dtype: str,
    rngs: nnx.Rngs,
    stride: int = 1,
    pad: tuple[int, int] | None = None,
    use_bias: bool = True,
) -> nnx.Conv:
    """A square NHWC convolution padded by `pad` = (before, after) zeros, both axes alike.

    The default is PyTorch's `padding=kernel // 2`. "SAME" is avoided on purpose: at stride 2 it
    pads (0, 1), not (1, 1).
    """
    pad = pad or (kernel // 2, kernel // 2)
    return nnx.Conv(
        in_channels,
        out_channels,
        (kernel, kernel),
        strides=(stride, stride),
        padding=(pad, pad),
        use_bias=use_bias,
        dtype=jnp.dtype(dtype),
        rngs=rngs,
    )


def upsample_nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Repeat every pixel twice in both directions."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)
