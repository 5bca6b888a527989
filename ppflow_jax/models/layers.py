"""Building blocks of the diffusion transformer (DiT, arXiv 2212.09748, Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ppflow_jax.devices.layout import Layout, PerDevice
from ppflow_jax.devices.programs import Programs
from ppflow_jax.models.attention import attend

if TYPE_CHECKING:
    from ppflow_jax.models.config import ModelConfig
    from ppflow_jax.models.leaves import Aux

_xavier = nnx.initializers.xavier_uniform()
_zeros = nnx.initializers.zeros
_normal = nnx.initializers.normal(0.02)

FREQUENCIES = 128


@dataclass(frozen=True)
class Execution:
    """How blocks are computed, not what; never in a checkpoint."""

    dtype: DTypeLike = jnp.float32
    programs: Programs = Programs()
    layout: Layout = Layout()


def timestep_features(t: Float[Array, " b"]) -> Float[Array, "b f"]:
    """[cos, sin] of t at 128 frequencies from 1 down to 1/10000; t in [0, 1], not rescaled."""
    k = jnp.arange(FREQUENCIES, dtype=jnp.float32)
    angles = t[:, None] * jnp.exp(-jnp.log(10000.0) * k / FREQUENCIES)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def layer_norm(x: Float[Array, "... d"], epsilon: float = 1e-6) -> Float[Array, "... d"]:
    """LayerNorm without learned scale and shift, computed in float32."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    centred = x - mean
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon)


def modulate(
    x: Float[Array, "b n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
) -> Float[Array, "b n d"]:
    """adaLN: normalise, then scale by (1 + scale) and shift, each per sample."""
    return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


def linear(
    d_in: int,
    d_out: int,
    rngs: nnx.Rngs,
    *,
    dtype: DTypeLike | None = None,
    init=_xavier,
    bias: bool = True,
) -> Linear:
    """Linear layer with float32 parameters computing in `dtype`."""
    return Linear(d_in, d_out, rngs=rngs, dtype=dtype, kernel_init=init, use_bias=bias)


class Linear(nnx.Linear):
    """Linear layer with the adapters that stand beside its kernel."""

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        return adapted(self, x, super().__call__(x))


def adapted(module: nnx.Module, x: Array, y: Array, prefix: str = "") -> Array:
    """gamma * y + beta + s (x A) B for y = x W + b, as far as `module` has them.

    See `models.adapters`. Computed in the dtype of y, whose last axes are those of the kernel.
    """
    gamma, beta, a, b = (
        None
        if (leaf := getattr(module, prefix + name, None)) is None
        else leaf[...].astype(y.dtype)
        for name in ("gamma", "beta", "lora_a", "lora_b")
    )

    def rows(leaf: Array) -> Array:
        return jnp.expand_dims(leaf, range(y.ndim - leaf.ndim))

    if gamma is not None:
        y = y * rows(gamma)
    if beta is not None:
        y = y + rows(beta)
    if a is not None:
        low = getattr(module, f"{prefix}factor") * (x.astype(y.dtype) @ a)
        y = y + jnp.tensordot(low, b, 1)
    return y


class TimestepEmbedder(nnx.Module):
    """Sinusoidal features of t through a two-layer MLP."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fc1 = linear(2 * FREQUENCIES, width, rngs, dtype=dtype, init=_normal)
        self.fc2 = linear(width, width, rngs, dtype=dtype, init=_normal)

    def __call__(
        self, t: Float[Array, " b"], more: Float[Array, "b f"] | None = None
    ) -> Float[Array, "b d"]:
        """`more` is added to the features of t (see `models.conditions.Scalar`)."""
        features = timestep_features(t) if more is None else timestep_features(t) + more
        # Cosines and sines are summed apart: shorter sums round less, and an error made here
        # reaches every block.
        cos, sin = jnp.split(features, 2, axis=-1)
        kernel = self.fc1.kernel[...]
        hidden = cos @ kernel[:FREQUENCIES] + sin @ kernel[FREQUENCIES:] + self.fc1.bias[...][None]
        return self.fc2(jax.nn.silu(adapted(self.fc1, features, hidden)))


class Attention(nnx.Module):
    """Multi-head self-attention; queries, keys and values come from one matrix product.

    The kernel is kept as [width, 3, heads, head_dim], so that a mesh can split the heads.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        programs: Programs = Programs(),
        per_device: PerDevice = Layout.heads,
    ):
        self.dtype, self.programs, self.per_device = dtype, programs, per_device
        shape = (3, heads, width // heads)
        self.qkv_kernel = nnx.Param(
            _xavier(rngs.params(), (width, 3 * width), jnp.float32).reshape(width, *shape)
        )
        self.qkv_bias = nnx.Param(jnp.zeros(shape))
        self.out = linear(width, width, rngs, dtype=dtype)

    def __call__(
        self, x: Float[Array, "b n d"], members: Float[Array, "b n"] | None = None
    ) -> Float[Array, "b n d"]:
        """With `members`, each token counts as often in every softmax (proportional attention)."""
        q, k, v = self.project(x)
        weight = None if members is None else jnp.log(members)[:, None, None]
        out = attend(self.programs.attention, q, k, v, weight, self.per_device)
        return self.per_token(self.out, out.reshape(x.shape))

    def project(self, x: Float[Array, "b n d"]) -> tuple[Float[Array, "b n h e"], ...]:
        """Queries, keys and values."""
        kernel, bias = (p[...].astype(self.dtype) for p in (self.qkv_kernel, self.qkv_bias))

        def project(x):
            y = jnp.einsum("...d,dche->...che", x, kernel)
            y = y + jnp.expand_dims(bias, range(x.ndim - 1))
            return adapted(self, x, y, "qkv_")

        qkv = self.per_token(project, x.astype(self.dtype))
        return tuple(qkv[:, :, i] for i in range(3))

    def logits(self, x: Float[Array, "b n d"]) -> Float[Array, "b h n n"]:
        """What enters the softmax: queries times keys over the root of the head's width."""
        q, k, _ = self.project(x)
        q = q * q.shape[-1] ** -0.5
        return jnp.einsum("bqhe,bkhe->bhqk", q, k, preferred_element_type=jnp.float32)

    def per_token(self, f: Callable[[Array], Array], x: Float[Array, "b n d"]) -> Array:
        return per_token(self.programs, f, x)


def per_token(
    programs: Programs, f: Callable[[Array], Array], x: Float[Array, "b n d"]
) -> Float[Array, "b n ..."]:
    """f of every token."""
    if not programs.rows:
        return f(x)
    out = f(x.reshape(-1, x.shape[-1]))
    return out.reshape(*x.shape[:-1], *out.shape[1:])


class Signal(nnx.Variable):
    """What the wrap of a block has for it in one pass, beside its weights."""


class Block(nnx.Module):
    """Transformer block. DiT's adaLN-Zero gates every branch, and its gates start at zero.

    Attributes:
      grid: rows and columns of the tokens that enter it; nothing that has weights depends on it.
    """

    attention: Attention
    grid: tuple[int, int] = (0, 0)

    def __init__(self, model: ModelConfig, run: Execution, *, rngs: nnx.Rngs):
        width = model.width
        self.spec, self.programs = model.block, run.programs
        self.dtype = run.dtype
        if self.spec.norm is None:
            self.adaln = linear(width, 6 * width, rngs, dtype=run.dtype, init=_zeros)
        for part in self.spec.parts:
            for name, module in part.modules(model, run, rngs).items():
                setattr(self, name, module)

    def given(self, signal: Any, grid: tuple[int, int]) -> Block:
        """This block, for tokens of a grid, with what its wrap has for it (None: nothing)."""
        self.grid = grid
        if signal is not None:
            self.signal = Signal(signal)
        return self

    def modulation(self, c: Float[Array, "b d"]) -> list[Float[Array, "b d"]]:
        """shift, scale, gate of the attention branch, then of the MLP.

        `c` is already SiLU(c), or what a norm of another kind makes of the time (`models.norms`).
        """
        if self.spec.norm is not None:
            return self.spec.norm.modulation(self, c)
        parts = jnp.split(self.adaln(c).astype(jnp.float32), 6, axis=-1)
        if hasattr(self, "gates_gamma"):
            for i, gamma in zip((2, 5), self.gates_gamma[...].astype(jnp.float32)):
                parts[i] = parts[i] * gamma[None]
        if self.spec.wrap is not None and (gate := self.spec.wrap.gate(self)) is not None:
            parts[2], parts[5] = parts[2] * gate[:, None], parts[5] * gate[:, None]
        return parts

    def modulated(self, branch: int, x: Array, shift: Array, scale: Array) -> Float[Array, "b n d"]:
        """What enters a branch, 0 attention and 1 MLP: x, normalised, scaled and shifted."""
        norm = self.spec.norm
        return modulate(x, shift, scale) if norm is None else norm(x, shift, scale)

    def per_token(self, f: Callable[[Array], Array], x: Float[Array, "b n d"]) -> Array:
        return per_token(self.programs, f, x)

    def mix(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """The branch in which tokens see each other before its gate, whatever part it is."""
        return self.spec.mixer(self, x)

    def mlp(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """The branch after attention before its gate, whatever part it is."""
        return self.spec.ffn(self, x)[0]

    def outputs(
        self, x: Float[Array, "b n d"], c: Float[Array, "b d"]
    ) -> tuple[Array, tuple[Array, Array], Aux]:
        """The block's output, its two branches before their gates, and what its parts give."""
        wrap = self.spec.wrap
        return self.inside(x, c) if wrap is None else wrap.outputs(self, x, c)

    def inside(
        self, x: Float[Array, "b n d"], c: Float[Array, "b d"]
    ) -> tuple[Array, tuple[Array, Array], Aux]:
        """`outputs` without what its wrap does."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
        attention = self.mix(self.modulated(0, x, shift1, scale1))
        x = x + gate1[:, None] * attention
        mlp, aux = self.spec.ffn(self, self.modulated(1, x, shift2, scale2))
        x = x + gate2[:, None] * mlp
        return x, (attention, mlp), aux

    def logits(self, x: Float[Array, "b n d"], c: Float[Array, "b d"]) -> Float[Array, "b h n n"]:
        """What enters the softmax of its attention, see `Attention.logits`."""
        shift, scale, *_ = self.modulation(c)
        if self.spec.wrap is not None:
            x = self.spec.wrap(self, x)
        return self.attention.logits(self.modulated(0, x, shift, scale))

    def branches(
        self, x: Float[Array, "b n d"], c: Float[Array, "b d"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b n d"], Float[Array, "b n d"]]:
        """The block's output, and the attention and MLP branches before their gates."""
        x, branches, _ = self.outputs(x, c)
        return x, *branches

    def gated(
        self,
        x: Float[Array, "b n d"],
        c: Float[Array, "b d"],
        attention: Float[Array, "b n d"],
        mlp: Float[Array, "b n d"],
    ) -> Float[Array, "b n d"]:
        """The block's output with given branches: only its gates are computed."""
        _, _, gate1, _, _, gate2 = self.modulation(c)
        return x + gate1[:, None] * attention + gate2[:, None] * mlp

    def __call__(self, x: Float[Array, "b n d"], c: Float[Array, "b d"]) -> Float[Array, "b n d"]:
        return self.outputs(x, c)[0]
