"""DiMR (arXiv 2406.09416): norms that time alone changes, and a loss at several resolutions.

TD-LN has no network between time and its scale and shift. Every one of their elements moves between
two learned ends, as a sigmoid of time with a learned rate and offset:

    theta(tau) = s theta_0 + (1 - s) theta_1,    s = sigmoid(tau (1 + w) + b),

with tau = 1 - 2t here, 1 at noise and -1 at data. A block has 16 D such numbers (8 D of RMS norms)
where adaLN has 6 D^2 + 6 D, a third of the weights of DiT-XL. Its branches have no gates. What the
image shows is told at the input: the sum of the embeddings of time, label and level is added to
every token. At one time scale and shift fold into the next product, see `folded`.

The multi-resolution loss is that of predictions and targets of lower resolution beside that of the
full one. DiMR has a branch of the network for every resolution; here, where a pyramid has stages,
the one prediction of a stage is averaged to them. The U-shaped network of the paper is not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ppflow_jax.errors import InputError
from ppflow_jax.flow.terms import View
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import Block, Execution, layer_norm
from ppflow_jax.models.leaves import Key, Leaves
from ppflow_jax.models.network import Output, Params
from ppflow_jax.models.norms import Norm
from ppflow_jax.models.parts import FullAttention, Mlp
from ppflow_jax.models.stack import Taps

EPSILON = 1e-5  # of the LayerNorm
SMALLEST = 1e-8  # added to the root mean square
NORMS = 2  # of a block: before attention and before the MLP
# Names of the original for the ends, rate and offset
_ENDS, _REST = ("param0", "param1"), {"rate": "nodecay_weight", "offset": "nodecay_bias"}


@dataclass(frozen=True)
class TdLn(Norm):
    """TD-LN.

    Attributes:
      rms: divide by the root mean square, without mean and shift, as inside the blocks of DiMR.
    """

    rms: bool = False

    kind = "tdln"
    undecayed = (r"blocks/tdln/\w+/(rate|offset)$",)

    def modules(self, model: ModelConfig, run: Execution, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        return {self.kind: Affine(model.width, self.rms)}

    def tokens(self, h: Float[Array, "b n d"], c: Float[Array, "b d"]) -> Float[Array, "b n d"]:
        return h + c[:, None]

    def vector(self, t: Float[Array, " b"], width: int) -> Float[Array, "b d"]:
        """tau, for every feature."""
        return jnp.broadcast_to((1 - 2 * t)[:, None], (len(t), width))

    def modulation(self, block: Block, c: Float[Array, "b d"]) -> list[Float[Array, "b d"]]:
        """The gates are 1."""
        scale = block.tdln.scale(c)
        shift = jnp.zeros_like(scale) if self.rms else block.tdln.shift(c)
        gate = jnp.ones_like(scale[:, 0])
        return [shift[:, 0], scale[:, 0], gate, shift[:, 1], scale[:, 1], gate]

    def __call__(
        self, x: Float[Array, "b n d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
    ) -> Float[Array, "b n d"]:
        if not self.rms:
            return layer_norm(x, EPSILON) * scale[:, None] + shift[:, None]
        return rms_norm(x) * scale[:, None]

    def keys(self, layer: int) -> Iterator[Key]:
        names = {"scale": "scale"} if self.rms else {"scale": "weight", "shift": "bias"}
        for ours, theirs in names.items():
            path = ("blocks", self.kind, ours)
            for norm in range(NORMS):
                name = f"blocks.{layer}.norm{norm + 1}.{theirs}"
                for end, torch in enumerate(_ENDS):
                    yield Key(f"{name}.{torch}", (*path, "ends"), (layer, norm, end))
                for leaf, torch in _REST.items():
                    yield Key(f"{name}.{torch}", (*path, leaf), (layer, norm))

    @classmethod
    def read(cls, state: Mapping[str, Any]) -> TdLn | None:
        names = {False: "weight", True: "scale"}
        found = [rms for rms, name in names.items() if f"blocks.0.norm1.{name}.param0" in state]
        return cls(found[0]) if found else None


def rms_norm(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """x / (sqrt(mean x^2) + 1e-8) in float32; its gradient at x = 0 is finite."""
    x = x.astype(jnp.float32)
    square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x / (jnp.sqrt(jnp.maximum(square, 1e-30)) + SMALLEST)


class Between(nnx.Module):
    """theta(tau) of both norms of a block."""

    def __init__(self, width: int, value: float):
        self.ends = nnx.Param(jnp.full((NORMS, len(_ENDS), width), value))
        self.rate, self.offset = (nnx.Param(jnp.zeros((NORMS, width))) for _ in range(2))

    def __call__(self, tau: Float[Array, "b d"]) -> Float[Array, "b norms d"]:
        leaves = {name: getattr(self, name)[...] for name in ("ends", "rate", "offset")}
        return between(leaves, tau)


def between(leaves: Mapping[str, Any], tau: Float[Array, "b d"]) -> Float[Array, "b ... d"]:
    """theta(tau), float32, from `ends` [..., 2, d], `rate` and `offset` [..., d]."""
    ends, rate, offset = (leaves[name].astype(jnp.float32) for name in ("ends", "rate", "offset"))
    tau = jnp.expand_dims(tau, range(1, rate.ndim))
    share = jax.nn.sigmoid(tau * (1 + rate)[None] + offset[None])
    return share * ends[None, ..., 0, :] + (1 - share) * ends[None, ..., 1, :]


class Affine(nnx.Module):
    """The leaves of a block's norms: fresh, plain norms with scale 1 and shift 0 at every time."""

    def __init__(self, width: int, rms: bool):
        self.scale = Between(width, 1.0)
        if not rms:
            self.shift = Between(width, 0.0)


def folded(model: ModelConfig, params: Params, t: float) -> Params:
    """Parameters that compute, at this time alone, the same with scale 1 and shift 0.

    W' = diag(gamma) W and b' = b + beta W, of queries, keys and values, and of the first product of
    the MLP; float32. For models that are evaluated at one time, such as a one-step student.

    Raises:
      InputError: blocks without TD-LN, or others than attention and MLP.
    """
    block = model.block
    if not isinstance(block.norm, TdLn) or (block.mixer, block.ffn) != (FullAttention(), Mlp()):
        raise InputError(
            f"only blocks of attention and MLP with norm=tdln are folded, not {block}: leave them"
        )
    blocks, tau = params["blocks"], block.norm.vector(jnp.full(1, t), model.width)
    own: Leaves = blocks[TdLn.kind]
    theta = {name: between(leaves, tau)[0] for name, leaves in own.items()}
    attention, fc1 = dict(blocks["attention"]), dict(blocks["fc1"])
    for i, (leaves, prefix) in enumerate(((attention, "qkv_"), (fc1, ""))):
        kernel, bias = leaves[f"{prefix}kernel"], leaves[f"{prefix}bias"]
        gamma = theta["scale"][:, i]
        rows = jnp.expand_dims(gamma, range(2, kernel.ndim))
        if "shift" in theta:
            beta = theta["shift"][:, i]
            leaves[f"{prefix}bias"] = bias + jnp.einsum("ld,ld...->l...", beta, kernel)
        leaves[f"{prefix}kernel"] = rows * kernel
    plain = {
        name: {k: jnp.full_like(leaf, k == "ends" and name == "scale") for k, leaf in each.items()}
        for name, each in own.items()
    }
    changed = {"attention": attention, "fc1": fc1, TdLn.kind: plain}
    return params | {"blocks": blocks | changed}


@dataclass(frozen=True)
class MultiResolution:
    """The loss at lower resolutions, a term beside that of the full one.

    The term is sum_r mean(pool_r(error)^2) / r^2 over the factors r, with pool_r the sum over r x r
    pixels divided by r, under which white noise keeps its variance. With weight 1 the whole is
    DiMR's loss: coefficients 1/4 and 1 for the factor 2, 1/16, 1/4 and 1 for 2 and 4.

    Attributes:
      factors: of the resolutions. A pyramid's are its patches over the last one: 2 of 4x4 and 2x2.

    Raises:
      InputError: none, one below 2, or one twice.
    """

    factors: tuple[int, ...] = (2,)

    name = "multires"
    fields = ()
    taps = Taps()

    def __post_init__(self):
        if not self.factors or min(self.factors) < 2 or len({*self.factors}) < len(self.factors):
            raise InputError(
                f"multires: factors {self.factors} must be different whole numbers of at least 2, "
                "such as factors=2/4"
            )

    def init(self, model: ModelConfig, key: Array) -> Params:
        """It has no leaves.

        Raises:
          InputError: a factor that does not divide the latent.
        """
        if wrong := [r for r in self.factors if model.latent_size % r]:
            raise InputError(
                f"multires: factor {wrong[0]} does not divide the latent of {model.latent_size}: "
                "choose one that does"
            )
        return {}

    def __call__(self, own: Mapping[str, Any], out: Output, view: View) -> Float[Array, " b"]:
        assert view.error is not None
        error = view.error(out.prediction)
        return sum(squares(pooled(error, r)) / r**2 for r in self.factors)


def squares(x: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """Mean over a sample's elements."""
    return jnp.mean(jnp.square(x), axis=(1, 2, 3))


def pooled(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b _ _ c"]:
    """Sums over blocks of factor x factor pixels, divided by the factor."""
    b, h, w, c = x.shape
    blocks = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return jnp.sum(blocks, axis=(2, 4)) / factor
