"""DiCo (arXiv 2505.11196): convolution in the place of attention.

    a = gelu(depthwise 3x3 (W_1 x)),   gate = sigmoid(W_g mean(a)),   out = W_2 (a gate),

gelu in its exact form, the mean over all tokens. The convolution is on the grid of the stage and
has zeros around it; the gate is what tokens far away know of each other. Weights do not depend on
the grid, so that all stages of a pyramid share them. Cost grows with the number of tokens; a block
has 3 D^2 + 9 D weights where attention has 4 D^2.

Here it is the mixer of a transformer's blocks; the network of the paper is `dico_network.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import Block, Execution, linear
from ppflow_jax.models.leaves import Key, Site
from ppflow_jax.models.parts import Aux, Mixer, Mlp

SIDE = 3  # of the convolution
_TORCH = {"first": "conv1", "gate": "ca.1", "last": "conv3"}  # names of the original


def point_keys(torch: str, *path: str | int, index: tuple[int, ...] = ()) -> Iterator[Key]:
    """Weight and bias of a 1x1 convolution, which is a linear layer."""
    ours, theirs = (lambda x: x[:, :, 0, 0].T), (lambda x: x.T[:, :, None, None])
    yield Key(f"{torch}.weight", (*path, "kernel"), index, ours, theirs)
    yield Key(f"{torch}.bias", (*path, "bias"), index)


@dataclass(frozen=True)
class DiCo(Mixer):
    """Depthwise convolution with a gate for every channel."""

    kind = "dico"
    attends = False
    rules = (
        (r"blocks/dico/(first|gate)/kernel$", P(None, "fsdp", "tensor")),
        (r"blocks/dico/(first|gate)/bias$", P(None, "tensor")),
        (r"blocks/dico/kernel$", P(None, None, None, "tensor")),
        (r"blocks/dico/bias$", P(None, "tensor")),
        (r"blocks/dico/last/kernel$", P(None, "tensor", "fsdp")),
    )
    matrices = ((r"blocks/dico/(first|gate|last)/kernel$", (1,), (2,)),)

    def modules(self, model: ModelConfig, run: Execution, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        return {self.kind: Convolution(model.width, run, rngs)}

    def __call__(self, block: Block, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        own: Convolution = block.dico
        a = own.tokens(block.per_token(own.first, x), block.grid)
        gated = (a * own.gates(a)).astype(own.dtype)
        return block.per_token(own.last, gated)

    def flops(self, model: ModelConfig, stage: int, tokens: int) -> int:
        """4 N D^2 + 18 N D + 2 D^2."""
        d = model.width
        return tokens and 4 * tokens * d * d + 2 * SIDE**2 * tokens * d + 2 * d * d

    def scores(self, model: ModelConfig, stage: int) -> int:
        return 0

    def keys(self, layer: int) -> Iterator[Key]:
        name, path, index = f"blocks.{layer}", ("blocks", self.kind), (layer,)
        for leaf, torch in _TORCH.items():
            yield from point_keys(f"{name}.{torch}", *path, leaf, index=index)
        yield Key(
            f"{name}.conv2.weight",
            (*path, "kernel"),
            index,
            lambda x: x[:, 0].transpose(1, 2, 0),
            lambda x: x.transpose(2, 0, 1)[:, None],
        )
        yield Key(f"{name}.conv2.bias", (*path, "bias"), index)

    def sites(self, model: ModelConfig) -> Iterator[Site]:
        for leaf, rows in (("first", "attention"), ("gate", "image"), ("last", "attention")):
            path = ("blocks", self.kind, leaf)
            yield Site("/".join(path), path, model.width, (model.width,), rows)

    @classmethod
    def read(cls, state: Any) -> DiCo | None:
        return cls() if "blocks.0.conv2.weight" in state else None


@dataclass(frozen=True)
class ExactMlp(Mlp):
    """The MLP of the paper's own blocks: gelu in its exact form."""

    kind = "exact"

    def __call__(self, block: Block, x: Float[Array, "b n d"]) -> tuple[Float[Array, "b n d"], Aux]:
        def mlp(x):
            return block.fc2(jax.nn.gelu(block.fc1(x), approximate=False))

        return block.per_token(mlp, x), {}

    def keys(self, layer: int) -> Iterator[Key]:
        for torch, name in (("conv4", "fc1"), ("conv5", "fc2")):
            yield from point_keys(f"blocks.{layer}.{torch}", "blocks", name, index=(layer,))


class Convolution(nnx.Module):
    """The leaves of one block, and what is between its two projections."""

    def __init__(self, width: int, run: Execution, rngs: nnx.Rngs):
        self.dtype = run.dtype
        bound = (6 / (SIDE**2 * (1 + width))) ** 0.5  # Xavier, as PyTorch counts a convolution
        shape = (SIDE, SIDE, width)
        drawn = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        self.kernel, self.bias = nnx.Param(drawn), nnx.Param(jnp.zeros(width))
        self.first, self.gate, self.last = (
            linear(width, width, rngs, dtype=run.dtype) for _ in range(3)
        )

    def tokens(self, x: Float[Array, "b n d"], grid: tuple[int, int]) -> Float[Array, "b n d"]:
        """gelu of the convolution, float32."""
        rows, cols = grid
        kernel, bias = (p[...].astype(jnp.float32) for p in (self.kernel, self.bias))
        padded = jnp.pad(
            x.astype(jnp.float32).reshape(len(x), rows, cols, -1), ((0, 0), (1, 1), (1, 1), (0, 0))
        )
        # A sum of shifted grids: one pass over memory, where compilers have slow grouped
        # convolutions
        out = bias[None, None, None]
        for i, j in np.ndindex(SIDE, SIDE):
            out = out + padded[:, i : i + rows, j : j + cols] * kernel[i, j][None, None, None]
        return jax.nn.gelu(out, approximate=False).reshape(x.shape)

    def gates(self, a: Float[Array, "b n d"]) -> Float[Array, "b 1 d"]:
        """Of every channel, between 0 and 1."""
        mean = jnp.mean(a, axis=1)
        return jax.nn.sigmoid(self.gate(mean).astype(jnp.float32))[:, None]
