"""DyDiT (arXiv 2410.03456, 2504.06803): width that follows the time, and tokens that skip the MLP.

Routers decide what of a block is computed. The time alone decides on its heads and on as many
groups of hidden units of its MLP, of which the first is always on; every token decides whether the
MLP sees it. With e(t) the embedding of the time, without class and level:

    heads = [1, W_a e(t) + b_a > 0]            times what leaves each head, before the projection
    hidden = [1, W_m e(t) + b_m > 0]           times each group of hidden units, before GELU
    token = w_2 ReLU(W_1 x + b_1) + b_2 > 0    times the gated MLP; x is what leaves attention

In training a decision is noisy: y = sigmoid((l + g) / 5) for a logit l and g of the standard
logistic distribution, on where y > 1/2, with the gradient of y (see `dydit_training`). Sampling
computes slices of the weights instead of masks (see `dydit_widths`).

What the authors' code (alibaba-damo-academy/DyDiT) does and this does not: its "on" is 1 up to
6e-8, here exactly 1; its routers start from random weights, here those of the last layers from
zero, so that a model made from another computes exactly what that did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt

from ppflow_jax.errors import InputError
from ppflow_jax.models.attention import attend
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import Block, linear
from ppflow_jax.models.parts import (
    Aux,
    Execution,
    FullAttention,
    Key,
    Leaves,
    Mlp,
    Wrap,
    linear_keys,
)
from ppflow_jax.systems.attention_branch import projected

TEMPERATURE = 5.0
WIDTH_BIAS, TOKEN_BIAS = 15.0, 35.0  # everything is on at first
_zeros = nnx.initializers.zeros


class Noise(NamedTuple):
    """What training adds to the logits of a stage, of every layer and image.

    Attributes:
      heads, hidden: those of the time.
      tokens: those of the tokens.
    """

    heads: Float[Array, "depth b r"]
    hidden: Float[Array, "depth b r"]
    tokens: Float[Array, "depth b n"]

    @classmethod
    def drawn(cls, seeds: UInt[Array, " b"], model: ModelConfig, stage: int) -> Noise:
        """Logistic noise of images with these seeds."""
        rows, cols = model.pyramid.grid(stage, model.latent_size)
        counts = (model.heads - 1, model.heads - 1, rows * cols)

        def one(seed):
            keys = jax.random.split(jax.random.key(seed), len(counts))
            return [jax.random.logistic(k, (model.depth, n)) for k, n in zip(keys, counts)]

        return cls(*(jnp.swapaxes(each, 0, 1) for each in jax.vmap(one)(seeds)))

    @classmethod
    def complete(cls, like: Noise) -> Noise:
        """With which everything is on, whatever the routers say."""
        return cls(*(jnp.full(each.shape, jnp.inf) for each in like))


def switched(
    logits: Float[Array, "*s"], noise: Float[Array, "*s"] | None = None
) -> Float[Array, "*s"]:
    """1 where a logit is positive, else 0.

    With noise: of their sum, and the gradient is that of sigmoid((logit + noise) / 5).
    """
    if noise is None:
        return jnp.float32(logits > 0)
    y = jax.nn.sigmoid((logits + noise) / TEMPERATURE)
    return jnp.float32(logits + noise > 0) + (y - jax.lax.stop_gradient(y))


def spent(
    heads: Array,
    hidden: Array,
    tokens: Array,
    attention: float,
    mlp: float,
) -> Array:
    """Share of a block's FLOPs that is computed: (A heads + M hidden tokens) / (A + M).

    Args:
      heads, hidden, tokens: the share of each that is on, float32 of like shapes.
      attention, mlp: A and M, what the whole branches cost.
    """
    return (attention * heads + mlp * hidden * tokens) / (attention + mlp)


@dataclass(frozen=True)
class DyDiT(Wrap):
    """Routers in every block, of as many groups as it has heads."""

    kind = "dydit"
    term_names = ("complete",)

    def check(self, model: ModelConfig) -> None:
        """
        Raises:
          InputError: other branches than DiT's, or an MLP that heads do not divide.
        """
        block = model.block
        if (block.mixer, block.ffn) != (FullAttention(), Mlp()):
            raise InputError(
                f"config.model.wrap={self} is for blocks of full attention and an MLP, these have "
                f"{block.mixer} and {block.ffn}: leave config.model.mixer and config.model.ffn out"
            )
        if block.norm is not None:
            raise InputError(
                f"config.model.wrap={self} is for the gates of adaLN, which blocks with "
                f"{block.norm} do not have: leave config.model.norm out"
            )
        if (hidden := int(model.mlp_ratio * model.width)) % model.heads:
            raise InputError(
                f"config.model.wrap={self} cuts the MLP into as many groups as there are heads: "
                f"{hidden} hidden units must be divisible by heads ({model.heads})"
            )

    def modules(self, model: ModelConfig, run: Execution, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        return {self.kind: Routers(model, rngs)}

    def signals(
        self, leaves: Leaves, embed: Callable[[Array], Array], t: Float[Array, " b"], *drawn: Noise
    ) -> tuple[dict[str, Float[Array, "depth b _"]], Aux]:
        """The masks `heads` and `hidden`, and the noise of `tokens` if `Noise` is drawn."""
        noise = drawn[0] if drawn else None
        masks = {}
        for name, logits in self.logits(leaves, embed(t)).items():
            on = switched(logits, None if noise is None else getattr(noise, name))
            first = jnp.ones((*on.shape[:-1], 1))
            masks[name] = jnp.concatenate([first, on], axis=-1)
        return masks if noise is None else masks | {"tokens": noise.tokens}, {}

    def logits(
        self, leaves: Leaves, time: Float[Array, "b d"]
    ) -> dict[str, Float[Array, "depth b r"]]:
        """What the time decides, float32, without the groups that are always on."""
        time = time.astype(jnp.float32)
        return {
            name: jnp.einsum("bd,ldr->lbr", time, leaves[name]["kernel"])
            + leaves[name]["bias"][:, None]
            for name in ("heads", "hidden")
        }

    def __call__(self, block: Block, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return x

    def outputs(
        self, block: Block, x: Array, c: Array, capacity: int | None = None
    ) -> tuple[Array, tuple[Array, Array], Aux]:
        """See `Block.outputs`. The branch of the MLP is 0 for tokens that skip it.

        Given slices of the weights and of the masks it computes these alone. Of the tokens that
        are on, the `capacity` with the largest logits pass the MLP, all by default.
        """
        masks = block.signal.get_value()
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)
        attention = self.attention(block, block.modulated(0, x, shift1, scale1), masks["heads"])
        x = x + gate1[:, None] * attention
        logits = block.dydit.token_logits(x)
        tokens = switched(logits, masks.get("tokens"))
        entering = block.modulated(1, x, shift2, scale2)
        if capacity is None or capacity >= x.shape[1]:
            mlp = tokens[..., None] * self.mlp(block, entering, masks["hidden"])
        else:
            mlp = self.some(block, entering, masks["hidden"], logits, capacity)
        x = x + gate2[:, None] * mlp
        shares = (jnp.mean(m, axis=-1) for m in (masks["heads"], masks["hidden"], tokens))
        return x, (attention, mlp), {"spent": spent(*shares, *costs(block, x))}

    def attention(
        self, block: Block, x: Float[Array, "b n d"], heads: Float[Array, "_ h"]
    ) -> Float[Array, "b n d"]:
        """The branch with what leaves each head times its mask."""
        attention = block.attention
        q, k, v = attention.project(x)
        out = attend(attention.programs.attention, q, k, v, None, attention.per_device)
        return projected(attention, out * heads[:, None, :, None].astype(out.dtype))

    def mlp(
        self, block: Block, x: Float[Array, "b n d"], hidden: Float[Array, "_ g"]
    ) -> Float[Array, "b n d"]:
        """The branch with each group of hidden units times its mask."""
        units = block.per_token(block.fc1, x)
        groups = units.reshape(*units.shape[:2], hidden.shape[-1], -1)
        masked = (groups * hidden[:, None, :, None].astype(units.dtype)).reshape(units.shape)
        return block.per_token(block.fc2, jax.nn.gelu(masked, approximate=True))

    def some(
        self,
        block: Block,
        x: Float[Array, "b n d"],
        hidden: Array,
        logits: Float[Array, "b n"],
        capacity: int,
    ) -> Float[Array, "b n d"]:
        """The MLP of the tokens with the largest logits, 0 for others and where these are <= 0."""
        largest, where = jax.lax.top_k(logits, capacity)
        taken = jnp.take_along_axis(x, where[..., None], axis=1)
        y = switched(largest)[..., None] * self.mlp(block, taken, hidden)
        rows = jnp.arange(len(x))[:, None]
        return jnp.zeros((*x.shape[:2], y.shape[-1]), y.dtype).at[rows, where].set(y)

    def terms(self, aux: Aux) -> dict[str, Float[Array, ""]]:
        """`spent`, a mean over layers and images."""
        return {"spent": jnp.mean(aux["spent"])}

    def flops(self, model: ModelConfig, tokens: int) -> int:
        """The routers'."""
        return 2 * (model.width + 1) * tokens * _narrow(model) + 4 * model.width * (model.heads - 1)

    def keys(self, layer: int) -> Iterator[Key]:
        path, index = ("blocks", self.kind), (layer,)
        for torch, name in _TORCH.items():
            yield from linear_keys(f"blocks.{layer}.{torch}", *path, name, index=index)

    @classmethod
    def read(cls, state: Any) -> DyDiT | None:
        return cls() if "blocks.0.attn_rate.router.weight" in state else None

    def start(self, model: ModelConfig, source: ModelConfig, blocks: Leaves, key: Array) -> Leaves:
        """Everything is on, exactly: the model computes what it did without."""
        make = lambda k: nnx.to_pure_dict(nnx.state(Routers(model, nnx.Rngs(k))))
        return blocks | {self.kind: jax.vmap(make)(jax.random.split(key, model.depth))}


_TORCH = {
    "attn_rate.router": "heads",
    "mlp_rate.router": "hidden",
    "token_selection.mlp_head.0": "tokens1",
    "token_selection.mlp_head.2": "tokens2",
}


class Routers(nnx.Module):
    """The leaves of one block's routers."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        width, narrow = model.width, _narrow(model)
        self.heads = _router(width, model.heads - 1, WIDTH_BIAS, rngs)
        self.hidden = _router(width, model.heads - 1, WIDTH_BIAS, rngs)
        self.tokens1 = linear(width, narrow, rngs)
        self.tokens2 = _router(narrow, 1, TOKEN_BIAS, rngs)

    def token_logits(self, x: Float[Array, "b n d"]) -> Float[Array, "b n"]:
        """Float32."""
        (w1, b1), (w2, b2) = (
            (layer.kernel[...].astype(jnp.float32), layer.bias[...].astype(jnp.float32))
            for layer in (self.tokens1, self.tokens2)
        )
        return jnp.squeeze(
            jax.nn.relu(x.astype(jnp.float32) @ w1 + b1[None, None]) @ w2 + b2[None, None], -1
        )


def _router(d_in: int, d_out: int, bias: float, rngs: nnx.Rngs) -> nnx.Module:
    router = linear(d_in, d_out, rngs, init=_zeros)
    router.bias[...] = jnp.full(d_out, bias)
    return router


def _narrow(model: ModelConfig) -> int:
    return max(1, model.width // 16)


def costs(block: Block, x: Float[Array, "b n d"]) -> tuple[float, float]:
    """Multiplications of a block's whole branches: 4 N D^2 + 2 N^2 D, and 2 N D times the units."""
    n, d = x.shape[1:]
    attention, mlp = 4 * n * d * d + 2 * n * n * d, 2 * n * d * block.fc1.kernel.shape[-1]
    return float(attention), float(mlp)
