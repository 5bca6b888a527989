"""DiT-MoE (arXiv 2407.11633): a mixture of experts in the place of the MLP.

Every token passes the K experts with the largest s = softmax(x W), weighted by s, and shared
experts besides: y = sum_K s_e E_e(x) + S(x), E and S SwiGLU without biases. The balance term keeps
the experts in use. A mixture can start from a trained MLP (upcycling).
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
from jaxtyping import Array, Float, Int

from ppflow_jax.devices.exchange import EXPERT
from ppflow_jax.errors import InputError
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import Block
from ppflow_jax.models.parts import Aux, Execution, Ffn, Key, Leaves, Mlp
from ppflow_jax.systems.capacity import travelling
from ppflow_jax.systems.experts import mixture

EXPERTS = ("swiglu", "gelu")
DROPPED = "experts/dropped"  # share of the pairs of token and expert
ROUTER_SCALE = 0.02  # standard deviation of the router of an upcycled model
_xavier = nnx.initializers.xavier_uniform(in_axis=-2, out_axis=-1, batch_axis=0)


@dataclass(frozen=True)
class MoE(Ffn):
    """A mixture of experts.

    Attributes:
      experts: how many.
      top_k: how many of them a token passes.
      shared: hidden width of the shared experts over the model's width; 0 is none.
      renormalise: the weights of a token's experts sum to 1. DiT-MoE leaves them as they are.
      expert: `swiglu`, or `gelu`, the MLP of DiT with its biases.

    Raises:
      InputError: a value out of its range.
    """

    experts: int = 8
    top_k: int = 2
    shared: int = 2
    renormalise: bool = False
    expert: str = "swiglu"

    kind = "moe"
    term_names = ("balance",)
    rules = (
        (r"blocks/moe/(gate|up)$", P(None, EXPERT, None, ("tensor", "fsdp"))),
        (r"blocks/moe/up_bias$", P(None, EXPERT, "tensor")),
        (r"blocks/moe/down$", P(None, EXPERT, ("tensor", "fsdp"))),
        (r"blocks/moe/shared/(gate|up)$", P(None, None, ("tensor", "fsdp"))),
        (r"blocks/moe/shared/down$", P(None, ("tensor", "fsdp"))),
    )
    matrices = (
        (r"blocks/moe/(gate|up|down)$", (2,), (3,)),
        (r"blocks/moe/shared/(gate|up|down)$", (1,), (2,)),
    )

    def __post_init__(self):
        if self.experts < 1 or not 1 <= self.top_k <= self.experts or self.shared < 0:
            raise InputError(
                f"{self}: experts must be at least 1, top_k in [1, experts], shared at least 0"
            )
        if self.expert not in EXPERTS:
            raise InputError(f"{self}: unknown expert, one of {', '.join(EXPERTS)}")

    @property
    def products(self) -> int:
        """Of one expert."""
        return 3 if self.expert == "swiglu" else 2

    def modules(self, model: ModelConfig, run: Execution, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        return {"moe": Experts(self, model, run, rngs)}

    def __call__(self, block: Block, x: Float[Array, "b n d"]) -> tuple[Array, Aux]:
        scores, gate, expert = self.route(block.moe.router[...], x)
        y, kept = block.moe(x, gate, expert)
        if self.shared:
            y = y + block.per_token(block.moe.shared, x)
        aux = {"balance": balance(scores, expert)}
        return y, aux if kept is None else aux | {DROPPED: 1 - jnp.mean(kept)}

    def route(
        self, router: Float[Array, "d e"], x: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b n e"], Float[Array, "b n k"], Int[Array, "b n k"]]:
        """softmax(x W) in float32, and the weights and numbers of every token's experts."""
        x, router = x.astype(jnp.float32), router.astype(jnp.float32)
        scores = jax.nn.softmax(x @ router, axis=-1)
        gate, expert = jax.lax.top_k(scores, self.top_k)
        if self.renormalise:
            gate = gate / jnp.sum(gate, axis=-1, keepdims=True)
        return scores, gate, expert

    def terms(self, aux: Aux) -> dict[str, Float[Array, ""]]:
        """The balance term, summed over layers; as a measure what was dropped, their mean."""
        found = {"balance": jnp.sum(aux["balance"])}
        return found | ({DROPPED: jnp.mean(aux[DROPPED])} if DROPPED in aux else {})

    def flops(self, model: ModelConfig, tokens: int) -> int:
        """Of the experts that tokens pass, the shared ones and the router."""
        routed = self.top_k * self.products * int(model.mlp_ratio * model.width)
        units = routed + 3 * self.shared * model.width + self.experts
        return 2 * tokens * model.width * units

    def hidden(self, model: ModelConfig) -> float:
        products = 2 if self.expert == "swiglu" else 1
        return products * self.top_k * model.mlp_ratio * model.width + 2 * self.shared * model.width

    def keys(self, layer: int) -> Iterator[Key]:
        name, path = f"blocks.{layer}.moe", ("blocks", "moe")

        def key(torch: str, *leaf: str, index: tuple[int, ...] = (layer,)) -> Key:
            return Key(f"{name}.{torch}", (*path, *leaf), index, np.transpose, np.transpose)

        yield key("gate.weight", "router")
        for e in range(self.experts):
            for torch, leaf in _TORCH[self.expert].items():
                yield key(f"experts.{e}.{torch}", leaf, index=(layer, e))
        if self.shared:
            for torch, leaf in _TORCH["swiglu"].items():
                yield key(f"shared_experts.{torch}", "shared", leaf)

    @classmethod
    def read(cls, state: Any, width: int) -> tuple[MoE, int] | None:
        """See `Ffn.read`: `top_k` (2) and `renormalise` (no) are not in names and shapes."""
        name = "blocks.0.moe"
        if f"{name}.gate.weight" not in state:
            return None
        experts = state[f"{name}.gate.weight"].shape[0]
        expert = "gelu" if f"{name}.experts.0.fc1.weight" in state else "swiglu"
        first = next(iter(_TORCH[expert]))
        found = [f"{name}.experts.0.{first}", f"{name}.shared_experts.gate_proj.weight"]
        hidden, shared = (state[n].shape[0] if n in state else 0 for n in found)
        part = cls(experts, min(cls.top_k, experts), shared // width, expert=expert)
        return (part, hidden) if hidden else None

    def start(self, model: ModelConfig, source: ModelConfig, blocks: Leaves, key: Array) -> Leaves:
        """Upcycling (arXiv 2212.05055): every expert is a copy of the MLP, the router is small.

        From the MLP of DiT, or from a mixture of one expert, whose shared experts stay. With
        `renormalise` the model computes what `source` does; without, as in DiT-MoE, the
        experts' output counts by the sum of a token's weights.
        """
        layers, experts = model.depth, self.experts
        kept = {name: leaf for name, leaf in blocks.items() if name not in ("fc1", "fc2", "moe")}
        moe = self._one_expert(source, blocks)
        copied = {
            name: jnp.broadcast_to(leaf, (layers, experts, *leaf.shape[2:]))
            for name, leaf in moe.items()
            if name != "shared"
        }
        shared = {name: leaf for name, leaf in moe.items() if name == "shared"}
        router = ROUTER_SCALE * jax.random.normal(key, (layers, model.width, experts))
        return kept | {"moe": copied | shared | {"router": router}}

    def _one_expert(self, source: ModelConfig, blocks: Leaves) -> Leaves:
        """Leaves of a mixture of one expert, as which `source` can be read."""
        ffn = source.block.ffn
        if ffn == Mlp() and (self.expert, self.shared) == ("gelu", 0):
            leaves = {"up": blocks["fc1"]["kernel"], "down": blocks["fc2"]["kernel"]}
            leaves |= {"up_bias": blocks["fc1"]["bias"], "down_bias": blocks["fc2"]["bias"]}
            return {name: jnp.expand_dims(leaf, 1) for name, leaf in leaves.items()}
        if ffn == MoE(1, 1, self.shared, getattr(ffn, "renormalise", False), self.expert):
            return {name: leaf for name, leaf in blocks["moe"].items() if name != "router"}
        raise InputError(
            f"{self} cannot start from weights with {ffn}: from mlp give expert=gelu,shared=0, "
            "from a mixture of one expert the same expert and shared"
        )


_TORCH = {
    "swiglu": {"gate_proj.weight": "gate", "up_proj.weight": "up", "down_proj.weight": "down"},
    "gelu": {
        "fc1.weight": "up",
        "fc1.bias": "up_bias",
        "fc2.weight": "down",
        "fc2.bias": "down_bias",
    },
}


def balance(scores: Float[Array, "b n e"], expert: Int[Array, "b n k"]) -> Float[Array, ""]:
    """sum_e f_e P_e: 1 if every expert is used alike, E / K if one set of K is always taken.

    f_e is the share of the pairs of token and expert that are e's, times E, without gradient; P_e
    the mean score. Means are over the whole batch, on however many devices it is; DiT-MoE takes
    those of one device.
    """
    count = scores.shape[-1]
    used = jnp.mean(jax.nn.one_hot(expert, count), axis=(0, 1, 2))
    return count * jnp.sum(used * jnp.mean(scores, axis=(0, 1)))


class Experts(nnx.Module):
    """The leaves of a mixture, and its routed branch."""

    def __init__(self, part: MoE, model: ModelConfig, run: Execution, rngs: nnx.Rngs):
        self.run = run
        count, width = part.experts, model.width
        hidden = int(model.mlp_ratio * width)

        def weight(d_in: int, d_out: int) -> nnx.Param:
            return nnx.Param(_xavier(rngs.params(), (count, d_in, d_out), jnp.float32))

        bound = width**-0.5  # as PyTorch draws a linear layer
        router = jax.random.uniform(rngs.params(), (width, count), minval=-bound, maxval=bound)
        self.router = nnx.Param(router)
        self.up, self.down = weight(width, hidden), weight(hidden, width)
        if part.expert == "swiglu":
            self.gate = weight(width, hidden)
        else:
            self.up_bias = nnx.Param(jnp.zeros((count, hidden)))
            self.down_bias = nnx.Param(jnp.zeros((count, width)))
        if part.shared:
            self.shared = SwiGlu(width, part.shared * width, run, rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        gate: Float[Array, "b n k"],
        expert: Int[Array, "b n k"],
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b n k"] | None]:
        """sum_k gate_k E_{expert_k}(x), and which of them were not dropped; None: none was.

        Each device computes the tokens of its own images, or all that come to its experts.
        """
        names = [n for n in ("gate", "up", "up_bias", "down") if hasattr(self, n)]
        weights = {name: getattr(self, name)[...].astype(self.run.dtype) for name in names}

        def here(rows, weights):
            x, *pairs = rows
            tokens = (a.reshape(-1, a.shape[-1]) for a in (x.astype(self.run.dtype), *pairs))
            return mixture(self.run.programs.experts, weights, *tokens).reshape(x.shape)

        def away(rows, weights, way):
            x, *pairs = rows
            tokens = (a.reshape(-1, a.shape[-1]) for a in (x.astype(self.run.dtype), *pairs))
            y, kept = travelling(weights, *tokens, self.router.shape[-1], way)
            return y.reshape(x.shape), kept.reshape(pairs[0].shape)

        rows, kept = (x, gate, expert), None
        if (exchanged := self.run.layout.exchanged) is None:
            y = self.run.layout.experts(here, rows, weights, "blocks/moe/")
        else:
            y, kept = exchanged(away, rows, weights, "blocks/moe/")
            gate = gate * kept
        if hasattr(self, "down_bias"):
            bias = self.down_bias[...].astype(jnp.float32)
            share = jnp.sum(jax.nn.one_hot(expert, len(bias)) * gate[..., None], axis=-2)
            y = y + share @ bias
        return y, kept


class SwiGlu(nnx.Module):
    """down(SiLU(gate x) * up x), without biases."""

    def __init__(self, width: int, hidden: int, run: Execution, rngs: nnx.Rngs):
        self.dtype = run.dtype

        def weight(*shape: int) -> nnx.Param:
            return nnx.Param(nnx.initializers.xavier_uniform()(rngs.params(), shape, jnp.float32))

        self.gate, self.up = weight(width, hidden), weight(width, hidden)
        self.down = weight(hidden, width)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        gate, up, down = (p[...].astype(self.dtype) for p in (self.gate, self.up, self.down))
        x = x.astype(self.dtype)
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down
