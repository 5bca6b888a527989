"""Softmax attention, softmax(q k^T / sqrt(e)) v, by one of several programs.

* `xla` leaves it to the compiler, which writes the scores to memory.
* `deferred` is the same with the softmax's division after the product with v, where there is less
  to divide. In this form XLA on CPU makes one parallel program of it all, which writes no scores.
* `cudnn` is cuDNN's flash attention (arXiv 2205.14135), for NVIDIA GPUs in bfloat16. It is `xla`
  where logits have a weight, and for shapes that it does not take (`devices.programs.cudnn_takes`).
* `splash` is JAX's own flash attention for TPU. It takes 512 tokens and more, in multiples of 128;
  it is `xla` for others, where logits have a weight or there are not as many queries as keys, and
  where a mesh does not divide the images or the heads.

Which of them `auto` is, `devices.programs` knows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float

from ppflow_jax.devices.layout import Layout, PerDevice
from ppflow_jax.devices.programs import cudnn_takes

SPLASH_TOKENS = 512
_LANES, _LARGEST_BLOCK = 128, 512


def attend(
    name: str,
    q: Float[Array, "b n h e"],
    k: Float[Array, "b m h e"],
    v: Float[Array, "b m h e"],
    weight: Float[Array, "b 1 1 m"] | None = None,
    per_device: PerDevice = Layout.heads,
) -> Float[Array, "b n h e"]:
    """Attention by program `name`, in the dtype of q with float32 softmax.

    `weight` is added to the logits. `per_device` runs a kernel on each device's part of batch and
    heads, or something else where it cannot.
    """
    tokens = q.shape[1]
    square = weight is None and k.shape[1] == tokens
    if name == "splash" and square and tokens >= SPLASH_TOKENS and tokens % _LANES == 0:
        return per_device(splash, _xla)(q, k, v)
    if name == "deferred":
        return _deferred(q, k, v, weight)
    if name == "cudnn" and weight is None and cudnn_takes(q.shape[-1], tokens):
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return jax.nn.dot_product_attention(q, k, v, weight, implementation="xla")


def splash(
    q: Float[Array, "b n h e"],
    k: Float[Array, "b n h e"],
    v: Float[Array, "b n h e"],
    *,
    interpret: bool = False,
) -> Float[Array, "b n h e"]:
    """The kernel for TPU, n a multiple of 128; `interpret` runs it anywhere, slowly."""
    n, heads, width = q.shape[1:]
    block = next(b for b in range(_LARGEST_BLOCK, 0, -_LANES) if n % b == 0)
    run = kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask((n, n))] * heads),
        block_sizes=kernel.BlockSizes(*(block,) * 8),
        interpret=interpret,
    )
    q, k, v = (a.swapaxes(1, 2) for a in (q * width**-0.5, k, v))
    return jax.vmap(run)(q, k, v).swapaxes(1, 2)


def _deferred(q, k, v, weight):
    q, k, v = (a.swapaxes(1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))
    scores = jnp.einsum("bhqe,bhke->bhqk", q, k, preferred_element_type=jnp.float32)
    scores = scores if weight is None else scores + weight
    p = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    out = jnp.einsum("bhqk,bhke->bhqe", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / jnp.sum(p, axis=-1, keepdims=True)).astype(q.dtype).swapaxes(1, 2)


def _xla(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")
