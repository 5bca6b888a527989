"""Switch-DiT (arXiv 2403.09176): experts that the time alone chooses.

Before a block, h is multiplied by m = 1 + sum_K p_e (h W_e + b_e), with p = softmax(W SiLU(e(t)))
of the time's embedding e(t), of which the K largest count. The block sees u = h * m, and what the
multiplication took away comes back after it: h + B(u) - u. As all tokens of an image have one time,
sum_K p_e W_e is one matrix, in sampling one of all images: a block costs one product more.

The prior spreads the choices over times: times near data share experts, times near noise change
them often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from ppflow_jax.errors import InputError
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import Block, linear
from ppflow_jax.models.parts import Aux, Execution, Key, Leaves, Wrap, linear_keys

TIMES = 1000  # at which the prior looks: n / 999 from data (n = 0) to noise
EPSILON = 1e-6
_POWER = 4


@dataclass(frozen=True)
class Switch(Wrap):
    """Experts by time around every block.

    Attributes:
      experts: of a block.
      top_k: how many of them count at a time.

    Raises:
      InputError: a value out of its range.
    """

    experts: int = 3
    top_k: int = 2

    kind = "switch"
    term_names = ("prior",)
    rules = ((r"blocks/switch/w$", P(None, None, None, "fsdp")),)
    matrices = ((r"blocks/switch/w$", (2,), (3,)),)

    def __post_init__(self):
        if not 1 <= self.top_k <= self.experts:
            raise InputError(f"{self}: top_k must be in [1, experts]")

    def modules(self, model: ModelConfig, run: Execution, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        return {"switch": Experts(self, model, run, rngs)}

    def signals(
        self, leaves: Leaves, embed: Callable[[Array], Array], t: Float[Array, " b"], *drawn: Any
    ) -> tuple[Float[Array, "depth b e"], Aux]:
        """The weight of every expert, 0 where it does not count; and what the prior looks at."""
        here = self.gates(leaves, embed(t))
        grid = self.gates(leaves, embed(1 - jnp.arange(TIMES) / (TIMES - 1)))
        aux = {"t": t, "gates": here, "used": self.kept(grid)}
        return jnp.where(self.kept(here), here, 0), aux

    def gates(self, leaves: Leaves, time: Float[Array, "b d"]) -> Float[Array, "depth b e"]:
        """softmax(W SiLU(e(t)) + b) of every layer, float32."""
        kernel, bias = leaves["gate"]["kernel"], leaves["gate"]["bias"]
        hidden = jax.nn.silu(time.astype(jnp.float32))
        logits = jnp.einsum("bd,lde->lbe", hidden, kernel) + bias[:, None]
        return jax.nn.softmax(logits, axis=-1)

    def kept(self, gates: Float[Array, "depth b e"]) -> Bool[Array, "depth b e"]:
        """Which experts count."""
        chosen = jax.lax.top_k(gates, self.top_k)[1]
        return jnp.sum(jax.nn.one_hot(chosen, self.experts), axis=-2) > 0

    def __call__(self, block: Block, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return x * block.switch(x, block.signal[...])

    def terms(self, aux: Aux) -> dict[str, Float[Array, ""]]:
        """The prior: 1/2 KL(P | M) + 1/2 KL(Q | M) to M = (P + Q) / 2, the mean over images.

        P are an image's gates in all layers, Q what the prior has for its time.
        """
        gates, used = (jnp.concatenate([*aux[name]], axis=-1) for name in ("gates", "used"))
        mask = self.prior(len(aux["gates"]))
        number = jnp.rint((1 - aux["t"]) * (TIMES - 1)).astype(jnp.int32)
        match = jax.lax.stop_gradient(matched(used, mask))
        prior = jnp.asarray(mask, jnp.float32)[number][:, match] / mask[0].sum()
        return {"prior": divergence(gates / len(aux["gates"]), prior)}

    def prior(self, depth: int) -> Bool[np.ndarray, "times units"]:
        """Which of all layers' experts the prior uses at every time."""
        units = depth * self.experts
        return prior_mask(units, units * self.top_k // self.experts)

    def flops(self, model: ModelConfig, tokens: int) -> int:
        """One matrix out of the experts', and its product with the tokens."""
        return 2 * (tokens + self.experts) * model.width**2

    def keys(self, layer: int) -> Iterator[Key]:
        name, path, index = f"routers.{layer}", ("blocks", "switch"), (layer,)
        yield from linear_keys(f"{name}.f_gate.1", *path, "gate", index=index)
        yield Key(f"{name}.experts.w", (*path, "w"), index)
        yield Key(f"{name}.experts.b", (*path, "b"), index)

    @classmethod
    def read(cls, state: Any) -> Switch | None:
        """See `Wrap.read`: `top_k` (2) is not in names and shapes."""
        name = "routers.0.experts.w"
        if name not in state:
            return None
        experts = state[name].shape[0]
        return cls(experts, min(cls.top_k, experts))

    def start(self, model: ModelConfig, source: ModelConfig, blocks: Leaves, key: Array) -> Leaves:
        """Fresh: the experts are zero at first, and the model computes what it did without."""
        depth, width = model.depth, model.width
        shape = (self.experts, width)
        bound = (6 / (width + self.experts)) ** 0.5
        kernel = jax.random.uniform(key, (depth, *shape[::-1]), minval=-bound, maxval=bound)
        gate = {"kernel": kernel, "bias": jnp.zeros((depth, self.experts))}
        experts = {"w": jnp.zeros((depth, *shape, width)), "b": jnp.zeros((depth, *shape))}
        return blocks | {"switch": experts | {"gate": gate}}


class Experts(nnx.Module):
    """The leaves of one block's experts and their gate."""

    def __init__(self, part: Switch, model: ModelConfig, run: Execution, rngs: nnx.Rngs):
        self.dtype = run.dtype
        shape = (part.experts, model.width)
        self.gate = linear(model.width, part.experts, rngs)
        self.w = nnx.Param(jnp.zeros((*shape, model.width)))
        self.b = nnx.Param(jnp.zeros(shape))

    def __call__(
        self, x: Float[Array, "b n d"], weights: Float[Array, "_ e"]
    ) -> Float[Array, "b n d"]:
        """The factor m, float32; `weights` of the experts are those of every image or of all."""
        w, b = (p[...].astype(jnp.float32) for p in (self.w, self.b))
        folded = jnp.einsum("be,edf->bdf", weights, w).astype(self.dtype)
        bias = (weights @ b)[:, None]
        x = x.astype(self.dtype)
        return 1 + jnp.einsum("bnd,bdf->bnf", x, folded).astype(jnp.float32) + bias


def prior_mask(units: int, width: int) -> Bool[np.ndarray, "times units"]:
    """A window of so many units at every time n, whose start moves with n^4."""
    n = np.arange(TIMES) / (TIMES - 1)
    start = np.rint(n**_POWER * (units - width)).astype(int)[:, None]
    unit = np.arange(units)[None]
    return (unit >= start) & (unit < start + width)


def matched(
    used: Bool[Array, "times units"], mask: Bool[np.ndarray, "times units"]
) -> Int[Array, " units"]:
    """The unit of the prior that stands for each of ours: the assignment of least differences."""
    used, other = used.astype(jnp.float32), jnp.asarray(mask, jnp.float32)
    both = jnp.einsum("ti,tj->ij", used, other, precision="highest")
    cost = jnp.sum(used, axis=0)[:, None] + jnp.sum(other, axis=0)[None] - 2 * both
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    return jnp.zeros(len(cost), jnp.int32).at[rows].set(columns.astype(jnp.int32))


def divergence(p: Float[Array, "b u"], q: Float[Array, "b u"]) -> Float[Array, ""]:
    """Jensen-Shannon divergence, the mean over rows."""
    middle = jnp.log((p + q) / 2 + EPSILON)
    halves = (jnp.sum(r * (jnp.log(r + EPSILON) - middle), axis=-1) for r in (p, q))
    return jnp.mean(sum(halves)) / 2
