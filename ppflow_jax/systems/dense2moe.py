"""Dense2MoE (arXiv 2510.09094): a trained MLP cut into a shared part and experts.

The hidden units of the MLP, y = W2 gelu(W1 x + b1) + b2, are a sum over units, so that any parts
of them add up to it. The `shared` ones every token passes, the others are dealt to experts, of
which a token passes K:

    y = W2_s gelu(W1_s x + b1_s) + b2 + sum_{e of the K largest} g_e W2_e gelu(W1_e x + b1_e)

With all experts and g = 1 that is the MLP, with K = 0 its shared part. So one set of leaves is the
dense model, the small one and what is between. Which units are shared is a matter of importance,
`importance`: `ordered` puts the largest first, and the first are shared. Of an MLP of hidden width
4 D, 1 D shared and 2 of 12 experts leave 37.5% active.

The gate of an expert is g = E softmax(x W)_e: the mean over all E experts is 1, so that a fresh
router, which is nearly indifferent, gates by nearly 1. The paper's own gate is not described where
it could be read; `gate=ones` has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ppflow_jax.errors import InputError
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import Block, linear
from ppflow_jax.models.leaves import Site
from ppflow_jax.models.parts import Aux, BlockSpec, Execution, Ffn, Key, Leaves, Mlp
from ppflow_jax.systems.moe import Experts, MoE, balance

GATES = ("softmax", "ones")
ROUTER_SCALE = 1e-3  # standard deviation of a fresh router: its gates are within some percent of 1


@dataclass(frozen=True)
class Dense2MoE(Ffn):
    """An MLP in slices.

    Attributes:
      experts: how many there are.
      top_k: how many of them a token passes; 0 is none.
      shared: hidden width of the shared slice over the model's width.
      gate: `softmax`, or `ones`, with which the router chooses and does not weigh.

    Raises:
      InputError: a value out of its range.
    """

    experts: int = 12
    top_k: int = 2
    shared: float = 1.0
    gate: str = "softmax"

    kind = "dense2moe"
    term_names = ("balance",)
    rules = MoE.rules[:3]
    matrices = MoE.matrices[:1]

    def __post_init__(self):
        if self.experts < 1 or not 0 <= self.top_k <= self.experts or not self.shared > 0:
            raise InputError(
                f"{self}: experts must be at least 1, top_k in [0, experts], shared above 0"
            )
        if self.gate not in GATES:
            raise InputError(f"{self}: unknown gate, one of {', '.join(GATES)}")

    def widths(self, model: ModelConfig) -> tuple[int, int]:
        """Hidden units of the shared slice and of an expert."""
        shared = round(self.shared * model.width)
        return shared, (int(model.mlp_ratio * model.width) - shared) // self.experts

    def check(self, model: ModelConfig) -> None:
        shared, each = self.widths(model)
        hidden = int(model.mlp_ratio * model.width)
        if shared < 1 or each < 1 or shared + self.experts * each != hidden:
            raise InputError(
                f"{self}: {hidden} hidden units less {shared} shared ones are not {self.experts} "
                "equal experts: choose experts that divide them"
            )

    def modules(self, model: ModelConfig, run: Execution, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        shared, _ = self.widths(model)
        return {
            "fc1": linear(model.width, shared, rngs, dtype=run.dtype),
            "fc2": linear(shared, model.width, rngs, dtype=run.dtype),
            "moe": Slices(self, model, run, rngs),
        }

    def __call__(self, block: Block, x: Float[Array, "b n d"]) -> tuple[Array, Aux]:
        y, _ = Mlp()(block, x)
        if self.top_k == 0:
            return y, {}
        if self.top_k == self.experts:
            return y + block.moe.all(x, self._gates(self._scores(block, x))), {}
        scores, gate, expert = self._routing.route(block.moe.router[...], x)
        routed, _ = block.moe(x, self._gates(gate), expert)
        return y + routed, {"balance": balance(scores, expert)}

    @property
    def _routing(self) -> MoE:
        return MoE(self.experts, self.top_k, 0, expert="gelu")

    def _scores(self, block: Block, x: Float[Array, "b n d"]) -> Float[Array, "b n e"]:
        """Of every expert in its place; of no meaning where gates are one."""
        if self.gate == "ones":
            return jnp.zeros((*x.shape[:2], self.experts))
        return self._routing.route(block.moe.router[...], x)[0]

    def _gates(self, scores: Float[Array, "b n k"]) -> Float[Array, "b n k"]:
        return jnp.ones_like(scores) if self.gate == "ones" else self.experts * scores

    def terms(self, aux: Aux) -> dict[str, Float[Array, ""]]:
        """The balance term, summed over layers; none where all experts are passed, or none."""
        return {"balance": jnp.sum(aux["balance"])} if "balance" in aux else {}

    def flops(self, model: ModelConfig, tokens: int) -> int:
        """4 N D u for u active units, and 2 N D E of the router if there are gates or a choice."""
        routed = 0 < self.top_k and (self.top_k < self.experts or self.gate != "ones")
        router = self.experts if routed else 0
        return 2 * tokens * model.width * (2 * int(self.hidden(model)) + router)

    def hidden(self, model: ModelConfig) -> float:
        shared, each = self.widths(model)
        return float(shared + self.top_k * each)

    def keys(self, layer: int) -> Iterator[Key]:
        yield from Mlp().keys(layer)
        name, path = f"blocks.{layer}.moe", ("blocks", "moe")
        yield Key(f"{name}.gate.weight", (*path, "router"), (layer,), np.transpose, np.transpose)
        for e in range(self.experts):
            for torch, leaf in (("fc1", "up"), ("fc2", "down")):
                own = f"{name}.experts.{e}.{torch}.weight"
                yield Key(own, (*path, leaf), (layer, e), np.transpose, np.transpose)
            yield Key(f"{name}.experts.{e}.fc1.bias", (*path, "up_bias"), (layer, e))

    def sites(self, model: ModelConfig) -> Iterator[Site]:
        """Those of the shared slice."""
        shared, _ = self.widths(model)
        yield Site("blocks/fc1", ("blocks", "fc1"), model.width, (shared,), "mlp")
        yield Site("blocks/fc2", ("blocks", "fc2"), shared, (model.width,), "mlp")

    @classmethod
    def read(cls, state: Any, width: int) -> tuple[Dense2MoE, int] | None:
        """See `Ffn.read`: `top_k` (2) and `gate` (softmax) are not in names and shapes."""
        names = (f"blocks.0.{n}" for n in ("mlp.fc1.weight", "moe.gate.weight"))
        own, router = (state[name].shape[0] if name in state else 0 for name in names)
        if not own or not router:
            return None
        each = state["blocks.0.moe.experts.0.fc1.weight"].shape[0]
        return cls(router, min(cls.top_k, router), own / width), own + router * each

    def start(self, model: ModelConfig, source: ModelConfig, blocks: Leaves, key: Array) -> Leaves:
        """The first hidden units are shared, the others dealt to the experts in turn.

        From an MLP whose units are in the order of their importance (see `ordered`), or from the
        same slices with another K or gate.
        """
        ffn = source.block.ffn
        if isinstance(ffn, Dense2MoE) and replace(ffn, top_k=self.top_k, gate=self.gate) == self:
            return blocks
        if ffn != Mlp():
            raise InputError(f"{self} starts from mlp or the same slices, not from {ffn}")
        size = (model.depth, model.width, self.experts)
        router = ROUTER_SCALE * jax.random.normal(key, size)
        return blocks | sliced(blocks, self.widths(model)[0], self.experts, router)


class Slices(Experts):
    """The leaves of the experts."""

    def __init__(self, part: Dense2MoE, model: ModelConfig, run: Execution, rngs: nnx.Rngs):
        self.run = run
        (_, hidden), width = part.widths(model), model.width
        xavier = nnx.initializers.xavier_uniform(in_axis=-2, out_axis=-1, batch_axis=0)

        def weight(d_in: int, d_out: int) -> nnx.Param:
            return nnx.Param(xavier(rngs.params(), (part.experts, d_in, d_out), jnp.float32))

        router = ROUTER_SCALE * jax.random.normal(rngs.params(), (width, part.experts))
        self.router = nnx.Param(router)
        self.up, self.down = weight(width, hidden), weight(hidden, width)
        self.up_bias = nnx.Param(jnp.zeros((part.experts, hidden)))

    def all(self, x: Float[Array, "b n d"], gate: Float[Array, "b n e"]) -> Float[Array, "b n d"]:
        """sum_e gate_e E_e(x), in float32, without sorting tokens."""
        x, up, bias, down = (
            a.astype(self.run.dtype) for a in (x, self.up[...], self.up_bias[...], self.down[...])
        )
        h = jnp.einsum("bnd,edf->bnef", x, up) + bias[None, None]
        h = jax.nn.gelu(h, approximate=True) * gate[..., None].astype(h.dtype)
        return jnp.einsum("bnef,efd->bnd", h, down, preferred_element_type=jnp.float32)


def sliced(
    blocks: Leaves, shared: int, experts: int, router: Float[Array, "l d e"]
) -> dict[str, Leaves]:
    """The leaves `fc1`, `fc2` and `moe` from those of an MLP, the first `shared` units shared.

    Of the others, in their order, number i is unit i // experts of expert i % experts.
    """
    up, bias = blocks["fc1"]["kernel"], blocks["fc1"]["bias"]
    down = blocks["fc2"]["kernel"]
    layers, _, width = down.shape

    def dealt(x: Array, *shape: int) -> Array:  # units are axis 1
        return jnp.swapaxes(x[:, shared:].reshape(layers, -1, experts, *shape), 1, 2)

    return {
        "fc1": {"kernel": up[..., :shared], "bias": bias[:, :shared]},
        "fc2": {"kernel": down[:, :shared], "bias": blocks["fc2"]["bias"]},
        "moe": {
            "router": router,
            "up": jnp.swapaxes(dealt(jnp.swapaxes(up, 1, 2), width), 2, 3),
            "up_bias": dealt(bias),
            "down": dealt(down, width),
        },
    }


def importance(blocks: Leaves, gradient: Leaves) -> Float[Array, "l h"]:
    """|sum w dL/dw| of every hidden unit of an MLP, over its column of fc1 and its row of fc2.

    Args:
      blocks: leaves `fc1` and `fc2`, with an axis of depth.
      gradient: of the loss, by the same.
    """
    into = jnp.sum(blocks["fc1"]["kernel"] * gradient["fc1"]["kernel"], axis=1)
    out = jnp.sum(blocks["fc2"]["kernel"] * gradient["fc2"]["kernel"], axis=2)
    return jnp.abs(into + out)


def ordered(blocks: Leaves, importance: Float[np.ndarray, "l h"]) -> Leaves:
    """The same blocks with the hidden units of every MLP in descending importance, dtypes kept.

    It computes what it did: a sum in another order.
    """
    order: Int[np.ndarray, "l h"] = np.argsort(-importance, axis=1, kind="stable")

    def taken(leaf: np.ndarray, axis: int) -> np.ndarray:
        index = np.expand_dims(order, [a for a in range(1, leaf.ndim) if a != axis])
        return np.take_along_axis(leaf, index, axis)

    fc1, fc2 = blocks["fc1"], blocks["fc2"]
    into = {"kernel": taken(fc1["kernel"], 2), "bias": taken(fc1["bias"], 1)}
    return blocks | {"fc1": into, "fc2": fc2 | {"kernel": taken(fc2["kernel"], 1)}}


def whole(block: BlockSpec) -> BlockSpec:
    """All slices with gates of one and nothing around a block: the dense model, on its leaves."""
    ffn = block.ffn
    assert isinstance(ffn, Dense2MoE)
    return replace(block, ffn=replace(ffn, top_k=ffn.experts, gate="ones"), wrap=None)


def shared_only(block: BlockSpec) -> BlockSpec:
    """Without experts, on the same leaves."""
    return replace(block, ffn=replace(block.ffn, top_k=0))
