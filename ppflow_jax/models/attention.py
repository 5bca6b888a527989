"""Softmax attention, softmax(q k^T / sqrt(e)) v, by one of several programs.

* `xla` leaves it to the compiler, which writes the scores to memory.
* `deferred` is the same with the softmax's division after the product with v, where there is less
  to divide. In this form XLA on CPU makes one parallel program of it all, which writes no scores.
  (With it, the block's other products are those for CPU as well: `layers.Attention.per_token`.)
* `cudnn` is cuDNN's flash attention (arXiv 2205.14135), for NVIDIA GPUs in bfloat16.
* `pallas` is a kernel for TPU (elsewhere it is `xla`). The token counts of latent models are small,
  so all scores of one head fit a core's own memory: one program a head needs neither blocks nor a
  running maximum, and its backward pass needs nothing but q, k and v.
* `auto` is `deferred` on CPU and else `xla`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ppflow_jax.devices.layout import Attend
from ppflow_jax.errors import InputError

ATTENTIONS = ("auto", "xla", "deferred", "cudnn", "pallas")
MOST_TOKENS = 1024  # of the kernel; its backward pass then holds four times 4 MB
_VMEM_BYTES = 64 * 2**20


def choose(name: str, dtype: DTypeLike) -> str:
    """`auto` made definite for the present backend.

    Raises:
      InputError: an unknown program, or one that `dtype` does not have.
    """
    if name not in ATTENTIONS:
        raise InputError(f"unknown attention {name!r}: one of {', '.join(ATTENTIONS)}")
    if name == "cudnn" and jnp.dtype(dtype) != jnp.bfloat16:
        raise InputError("attention cudnn needs dtype bfloat16: choose that, or attention xla")
    if name == "auto":
        return "deferred" if jax.default_backend() == "cpu" else "xla"
    return name


def attend(
    name: str,
    q: Float[Array, "b n h e"],
    k: Float[Array, "b n h e"],
    v: Float[Array, "b n h e"],
    weight: Float[Array, "b 1 1 n"] | None = None,
    per_device: Callable[[Attend], Attend] = lambda f: f,
) -> Float[Array, "b n h e"]:
    """Attention by program `name`, in the dtype of q with float32 softmax.

    `weight` is added to the logits; with one, or more tokens than the kernel takes, `pallas` is
    `xla`. `per_device` runs a function on each device's part of batch and heads.
    """
    if name == "pallas" and weight is None and q.shape[1] <= MOST_TOKENS:
        return per_device(pallas_attention)(q, k, v)
    if name == "deferred":
        return _deferred(q, k, v, weight)
    implementation = "cudnn" if name == "cudnn" else "xla"
    return jax.nn.dot_product_attention(q, k, v, weight, implementation=implementation)


@jax.custom_vjp
def pallas_attention(
    q: Float[Array, "b n h e"], k: Float[Array, "b n h e"], v: Float[Array, "b n h e"]
) -> Float[Array, "b n h e"]:
    """The kernel on TPU, XLA's attention elsewhere."""
    return jax.lax.platform_dependent(
        q, k, v, tpu=functools.partial(forward, interpret=False), default=_xla
    )


def _pallas_fwd(q, k, v):
    return pallas_attention(q, k, v), (q, k, v)


def _pallas_bwd(saved, gradient):
    return jax.lax.platform_dependent(
        *saved,
        gradient,
        tpu=functools.partial(backward, interpret=False),
        default=lambda q, k, v, g: jax.vjp(_xla, q, k, v)[1](g),
    )


pallas_attention.defvjp(_pallas_fwd, _pallas_bwd)


def _deferred(q, k, v, weight):
    q, k, v = (a.swapaxes(1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))
    scores = jnp.einsum("bhqe,bhke->bhqk", q, k, preferred_element_type=jnp.float32)
    scores = scores if weight is None else scores + weight
    p = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    out = jnp.einsum("bhqk,bhke->bhqe", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / jnp.sum(p, axis=-1, keepdims=True)).astype(q.dtype).swapaxes(1, 2)


def _xla(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


def forward(q, k, v, *, interpret: bool):
    """The kernel itself; `interpret` runs it anywhere, slowly."""
    return _per_head(_forward_kernel, (q, k, v), 1, interpret)[0]


def backward(q, k, v, gradient, *, interpret: bool):
    """Gradients of q, k and v."""
    return tuple(_per_head(_backward_kernel, (q, k, v, gradient), 3, interpret))


def _per_head(kernel, arrays, outputs: int, interpret: bool):
    """Runs `kernel` on the [n, e] of every image and head."""
    b, n, h, e = arrays[0].shape
    one = pl.BlockSpec((None, None, n, e), lambda i, j: (i, j, 0, 0))
    results = pl.pallas_call(
        kernel,
        grid=(b, h),
        in_specs=[one] * len(arrays),
        out_specs=[one] * outputs,
        out_shape=[jax.ShapeDtypeStruct((b, h, n, e), arrays[0].dtype)] * outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(*(a.swapaxes(1, 2) for a in arrays))
    return [r.swapaxes(1, 2) for r in results]


def _dot(a, b, contract: tuple[int, int]):
    return jax.lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32
    )


def _probabilities(q, k):
    scores = _dot(q, k, (1, 1)) * q.shape[-1] ** -0.5
    p = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return p / jnp.sum(p, axis=1, keepdims=True)


def _forward_kernel(q, k, v, out):
    p = _probabilities(q[...], k[...])
    out[...] = _dot(p.astype(v.dtype), v[...], (1, 0)).astype(out.dtype)


def _backward_kernel(q, k, v, gradient, dq, dk, dv):
    """With p the probabilities and g the gradient of the result: dv = p^T g, and the scores' is
    p (dp - sum(p dp)) with dp = g v^T."""
    p, dp = _probabilities(q[...], k[...]), _dot(gradient[...], v[...], (1, 1))
    ds = p * (dp - jnp.sum(p * dp, axis=1, keepdims=True)) * q.shape[-1] ** -0.5
    ds, p = ds.astype(q.dtype), p.astype(q.dtype)
    dq[...] = _dot(ds, k[...], (1, 0)).astype(dq.dtype)
    dk[...] = _dot(ds, q[...], (0, 0)).astype(dk.dtype)
    dv[...] = _dot(p, gradient[...], (0, 0)).astype(dv.dtype)
