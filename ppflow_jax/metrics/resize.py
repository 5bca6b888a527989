"""The two ways in which pictures are made 299x299 for the Inception network, as matrix products.

`tf1`: inside the TensorFlow graph that FID was published with, used by ADM and torch-fidelity:
bilinear, corner-aligned source coordinate i * in / 299, then (x - 128) / 128. `torch`: pytorch-fid,
bilinear at half-pixel centres, max((i + 0.5) * in / 299 - 0.5, 0), then 2 x / 255 - 1. Neither
has a low-pass, also where a picture shrinks. Their FIDs differ: name the one that was used.
"""

from __future__ import annotations

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, UInt8

from ppflow_jax.metrics.inception import SIZE

CONVENTIONS = ("tf1", "torch")


def resize_matrix(size: int, convention: str) -> Float[np.ndarray, "299 size"]:
    """Weights of `size` pixels in each of 299; rows sum to 1."""
    i = np.arange(SIZE)
    if convention == "tf1":
        at = i * (size / SIZE)
    else:
        at = np.maximum((i + 0.5) * (size / SIZE) - 0.5, 0)
    low = np.minimum(np.floor(at).astype(int), size - 1)
    high = np.minimum(low + 1, size - 1)
    matrix = np.zeros((SIZE, size))
    np.add.at(matrix, (i, low), 1 - (at - low))
    np.add.at(matrix, (i, high), at - low)
    return matrix


def inception_input(
    images: UInt8[Array, "b h w 3"], convention: str
) -> Float[Array, "b 299 299 3"]:
    """Pictures 0..255 of any size -> what the network takes, float32."""
    rows, columns = (
        jnp.asarray(resize_matrix(size, convention), jnp.float32) for size in images.shape[1:3]
    )
    x = images.astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    x = jnp.einsum("ih,bhwc->biwc", rows, x, precision=highest)
    x = jnp.einsum("jw,biwc->bijc", columns, x, precision=highest)
    return (x - 128) / 128 if convention == "tf1" else 2 * x / 255 - 1
