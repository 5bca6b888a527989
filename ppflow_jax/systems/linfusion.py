"""LinFusion (arXiv 2409.02097): attention whose cost grows with the number of tokens.

With f(h) = h + phi(h), phi an MLP of its own for queries and for keys,

    q = elu(W_q f_q(h)) + 1,   k = elu(W_k f_k(h)) + 1,   v = W_v h,
    out = q (k^T v / N) / (q . mean(k) + 1e-4),

a mean of all values with weights q . k, which are positive. No pair of tokens is ever computed: the
sum over keys is one matrix of a head. W_q, W_k, W_v and the projection after it are those of full
attention, where a model starts; it must be trained for it (see `systems.mixer_distillation`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import Block, Execution, linear
from ppflow_jax.models.leaves import Key, Leaves, Site, linear_keys
from ppflow_jax.models.parts import FullAttention, Mixer

EPSILON = 1e-4  # beside the sum of a query's weights
_NORM_EPSILON = 1e-5
_SIDES = ("q", "k")


@dataclass(frozen=True)
class LinFusion(Mixer):
    """Linear attention.

    Attributes:
      hidden: units of phi; 0 takes the width of the model.

    Raises:
      InputError: a negative number of units.
    """

    hidden: int = 0

    kind = "linfusion"
    rules = (
        (r"blocks/linfusion/[qk]/fc1/kernel$", P(None, "fsdp", "tensor")),
        (r"blocks/linfusion/[qk]/fc1/bias$", P(None, "tensor")),
        (r"blocks/linfusion/[qk]/fc2/kernel$", P(None, "tensor", "fsdp")),
    )
    matrices = ((r"blocks/linfusion/[qk]/fc[12]/kernel$", (1,), (2,)),)

    def __post_init__(self):
        if self.hidden < 0:
            raise InputError(f"{self}: hidden must be at least 0 (the width)")

    def modules(self, model: ModelConfig, run: Execution, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        hidden = self.hidden or model.width
        modules = super().modules(model, run, rngs)
        own = {name: Phi(model.width, hidden, run, rngs) for name in _SIDES}
        return modules | {self.kind: nnx.Dict(own)}

    def __call__(self, block: Block, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        attention, phi = block.attention, block.linfusion
        given = [x + block.per_token(phi[name], x) for name in _SIDES]
        kernel, bias = (
            p[...].astype(attention.dtype) for p in (attention.qkv_kernel, attention.qkv_bias)
        )

        def project(i: int, x: Array) -> Array:
            def one(x: Array) -> Array:
                y = jnp.einsum("...d,dhe->...he", x, kernel[:, i])
                return y + jnp.expand_dims(bias[i], range(x.ndim - 1))

            return block.per_token(one, x.astype(attention.dtype))

        q, k, v = (project(i, each) for i, each in enumerate((*given, x)))
        out = linear_attention(q, k, v)
        return block.per_token(attention.out, out.reshape(x.shape))

    def flops(self, model: ModelConfig, stage: int, tokens: int) -> int:
        """8 N D^2 + 8 N D u for u units of phi + 4 N D e for heads of width e + 2 N D."""
        d, hidden = model.width, self.hidden or model.width
        return 2 * tokens * d * (4 * d + 4 * hidden + 2 * model.head_width + 1)

    def scores(self, model: ModelConfig, stage: int) -> int:
        """None of pairs; the matrix of a head."""
        return model.head_width**2

    def keys(self, layer: int) -> Iterator[Key]:
        for side in _SIDES:
            name, index = f"blocks.{layer}.attn.to_{side}_", (layer,)
            path = ("blocks", self.kind, side)
            yield from linear_keys(f"{name}.0", *path, "fc1", index=index)
            yield Key(f"{name}.1.weight", (*path, "scale"), index)
            yield Key(f"{name}.1.bias", (*path, "shift"), index)
            yield from linear_keys(f"{name}.3", *path, "fc2", index=index)

    def sites(self, model: ModelConfig) -> Iterator[Site]:
        """Only behind attention: queries, keys and values are not of one input here."""
        return (s for s in super().sites(model) if s.name == "blocks/attention/out")

    @classmethod
    def read(cls, state: Any) -> LinFusion | None:
        name = "blocks.0.attn.to_q_.0.weight"
        if name not in state:
            return None
        hidden, width = state[name].shape
        return cls(0 if hidden == width else hidden)

    def start(self, model: ModelConfig, source: ModelConfig, blocks: Leaves, key: Array) -> Leaves:
        """The weights of full attention; phi is zero at first."""
        if source.block.mixer != FullAttention():
            raise InputError(f"{self} starts from full attention, not from {source.block.mixer}")
        layers, d, hidden = model.depth, model.width, self.hidden or model.width
        bound = (6 / (d + hidden)) ** 0.5
        phi = {}
        for i, side in enumerate(_SIDES):
            draw = jax.random.fold_in(key, i)
            first = jax.random.uniform(draw, (layers, d, hidden), minval=-bound, maxval=bound)
            phi[side] = {
                "fc1": {"kernel": first, "bias": jnp.zeros((layers, hidden))},
                "scale": jnp.ones((layers, hidden)),
                "shift": jnp.zeros((layers, hidden)),
                "fc2": {"kernel": jnp.zeros((layers, hidden, d)), "bias": jnp.zeros((layers, d))},
            }
        return blocks | {self.kind: phi}


class Phi(nnx.Module):
    """Linear, LayerNorm, LeakyReLU, Linear; zero at first."""

    def __init__(self, width: int, hidden: int, run: Execution, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros
        self.fc1 = linear(width, hidden, rngs, dtype=run.dtype)
        self.scale, self.shift = nnx.Param(jnp.ones(hidden)), nnx.Param(jnp.zeros(hidden))
        self.fc2 = linear(hidden, width, rngs, dtype=run.dtype, init=zeros)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        h = self.fc1(x).astype(jnp.float32)
        h = h - jnp.mean(h, axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + _NORM_EPSILON)
        scale, shift = (
            jnp.expand_dims(p[...].astype(jnp.float32), range(h.ndim - 1))
            for p in (self.scale, self.shift)
        )
        return self.fc2(jax.nn.leaky_relu(h * scale + shift, 0.01))


def linear_attention(
    q: Float[Array, "b n h e"], k: Float[Array, "b m h e"], v: Float[Array, "b m h e"]
) -> Float[Array, "b n h e"]:
    """q (k^T v / M) / (q . mean(k) + 1e-4) of q = elu(q) + 1 and k = elu(k) + 1, M keys.

    The sums over keys in float32, the result in the dtype of q. The weights of a query sum to
    slightly less than 1.
    """
    dtype, keys = q.dtype, k.shape[1]
    q, k = (jax.nn.elu(a.astype(jnp.float32)) + 1 for a in (q, k))
    summed = jnp.einsum(
        "bmhe,bmhf->bhef", k.astype(dtype), v, preferred_element_type=jnp.float32
    ) * (1 / keys)
    out = jnp.einsum("bnhe,bhef->bnhf", q.astype(dtype), summed.astype(dtype))
    total = jnp.einsum("bnhe,bhe->bnh", q, jnp.mean(k, axis=1)) + EPSILON
    return (out.astype(jnp.float32) / total[..., None]).astype(dtype)
