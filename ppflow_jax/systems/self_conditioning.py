"""Self-conditioning of DDAE++ (arXiv 2505.10999): what is in the middle tells the later blocks.

The representations of a diffusion model are best in the middle of its blocks. Their mean over
tokens, g, is brought back as a condition of all blocks behind and of the final layer:

    c' = c + W_2 SiLU(W_1 LN(g)),        g = mean over tokens of h_k,

with c the sum of the embeddings of time, label and level and h_k the tokens after k blocks. W_2 is
zero at first, so that a new model, or one that starts from weights without it, computes what it did
before. The mean knows no grid: all stages of a pyramid share the weights. No code of the paper is
public; its contrastive self-distillation is not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError
from ppflow_jax.models.feedback import Feedback
from ppflow_jax.models.layers import Execution, layer_norm, linear
from ppflow_jax.models.leaves import Key, linear_keys

if TYPE_CHECKING:
    from ppflow_jax.models.config import ModelConfig
    from ppflow_jax.pyramid import Pyramid

LAYERS = ("fc1", "fc2")


@dataclass(frozen=True)
class SelfCondition(Feedback):
    """A pooled feature of the middle as a condition of what follows.

    Attributes:
      blocks: after how many it is taken; 0: after half of them.

    Raises:
      InputError: a number below 0.
    """

    kind = "selfcond"
    blocks: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.blocks < 0:
            raise InputError(f"condition {self}: blocks must be at least 0 (half of the model's)")

    def after(self, model: ModelConfig) -> int:
        return self.blocks or model.depth // 2

    def module(self, model: ModelConfig, run: Execution, rngs: nnx.Rngs) -> nnx.Module:
        return Middle(model.width, run, rngs)

    def added(self, module: Any, h: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        return module(jnp.mean(h.astype(jnp.float32), axis=1))

    def flops(self, model: ModelConfig) -> int:
        """4 D^2."""
        return 4 * model.width**2

    def keys(self, model: ModelConfig) -> Iterator[Key]:
        for layer in LAYERS:
            yield from linear_keys(
                f"conditions.{self.name}.{layer}", "conditions", self.name, layer
            )

    @classmethod
    def read(cls, state: Mapping[str, Any], name: str, pyramid: Pyramid) -> SelfCondition | None:
        """See `Condition.read`: `blocks` (0, half of them) is not in names and shapes."""
        return cls(name) if f"conditions.{name}.fc1.weight" in state else None


class Middle(nnx.Module):
    """W_2 SiLU(W_1 LN(g)), with biases; the second layer is zero at first."""

    def __init__(self, width: int, run: Execution, rngs: nnx.Rngs):
        self.fc1 = linear(width, width, rngs, dtype=run.dtype)
        self.fc2 = linear(width, width, rngs, dtype=run.dtype, init=nnx.initializers.zeros)

    def __call__(self, g: Float[Array, "b d"]) -> Float[Array, "b d"]:
        return self.fc2(jax.nn.silu(self.fc1(layer_norm(g)))).astype(jnp.float32)
