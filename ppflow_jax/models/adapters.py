"""Adapters: small leaves beside the kernels of a network, with one formula for all of them.

    y = gamma * (x W + b) + beta + s (x A) B

Every one of gamma, beta and the pair A, B is there or not. LoRA (arXiv 2106.09685) is A and B,
DiffFit (arXiv 2304.06648) gamma, the affiner of Diffscaler (arXiv 2404.09976) all four. A fresh
adapter changes nothing: gamma is 1, beta and B are 0. `merge` folds what has been learnt into
the kernels. Which leaves are trained, and which stay as they are, is another matter: see
`models.trees.split`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ppflow_jax.errors import InputError
from ppflow_jax.models.layers import FREQUENCIES
from ppflow_jax.models.leaves import Site
from ppflow_jax.models.trees import Path, Tree, at, parted, put

if TYPE_CHECKING:
    from ppflow_jax.models.config import ModelConfig

NONE = "none"
_LOW_RANK = ("lora_a", "lora_b")
# Leaves of every kind of adapter
KINDS = {
    "lora": _LOW_RANK,
    "scale": ("gamma",),
    "shift": ("beta",),
    "affiner": ("gamma", "beta", *_LOW_RANK),
}


@dataclass(frozen=True)
class Adapter:
    """Leaves beside some kernels.

    Attributes:
      kind: lora (A and B), scale (gamma), shift (beta) or affiner (all four).
      rank: of A and B.
      alpha: s is alpha / rank; 0: s is 1.
      rslora: s is alpha / sqrt(rank) (arXiv 2312.03732).
      on: pattern of the whole names of sites, see `sites`.

    Raises:
      InputError: a value out of its range.
    """

    kind: str = "lora"
    rank: int = 8
    alpha: float = 0.0
    rslora: bool = False
    on: str = "blocks/.*"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise InputError(f"unknown adapter {self.kind!r}: one of {', '.join(KINDS)}")
        if self.rank < 1 or not 0 <= self.alpha < math.inf:
            raise InputError(f"{self}: rank must be at least 1, alpha at least 0")
        try:
            re.compile(self.on)
        except re.error as e:
            raise InputError(f"{self}: on={self.on!r} is no regular expression ({e})") from e

    @property
    def leaves(self) -> tuple[str, ...]:
        return KINDS[self.kind]

    @property
    def factor(self) -> float:
        """s of the formula."""
        alpha = self.alpha or self.rank
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def __str__(self) -> str:
        """`kind:rank=8,alpha=0.0,rslora=false,on=PATTERN`, with what the kind has of it."""
        low = f"rank={self.rank},alpha={self.alpha},rslora={str(self.rslora).lower()},"
        return f"{self.kind}:{low if 'lora_a' in self.leaves else ''}on={self.on}"


_READERS = {
    "rank": int,
    "alpha": float,
    "rslora": {"true": True, "false": False}.__getitem__,
    "on": str,
}


def parse(text: str) -> tuple[Adapter, ...]:
    """The adapters of `lora:rank=8,on=blocks/.*;scale:on=blocks/gates`; none of `none`.

    Raises:
      InputError: an unknown kind or key, or a value that cannot be read.
    """
    found = []
    for part in filter(None, ("" if text == NONE else text).split(";")):
        kind, _, settings = part.partition(":")
        known = _READERS if "lora_a" in Adapter(kind).leaves else ("on",)
        values: dict[str, Any] = {}
        for pair in filter(None, settings.split(",")):
            key, _, value = pair.partition("=")
            if key not in known:
                raise InputError(
                    f"adapter {part!r}: unknown key {key!r}, {kind} has {', '.join(known)} (a "
                    "pattern has no comma or semicolon)"
                )
            try:
                values[key] = _READERS[key](value)
            except (ValueError, KeyError) as e:
                raise InputError(f"adapter {part!r}: {key} cannot be {value!r}") from e
        found.append(Adapter(kind, **values))
    return tuple(found)


def text(adapters: tuple[Adapter, ...]) -> str:
    """What `parse` reads."""
    return ";".join(map(str, adapters)) or NONE


def sites(model: ModelConfig) -> tuple[Site, ...]:
    """Where adapters may stand: all linear layers but those of mixtures of experts.

    `blocks/gates` is the pair of gates of a block, which adaLN computes: they have no kernel of
    their own and can be scaled only.
    """
    d, channels = model.width, model.channels
    out_channels = channels * (2 if model.learn_sigma else 1)
    found = [
        *(site for part in model.block.parts for site in part.sites(model)),
        *(_adaln(d) if model.block.norm is None else ()),
        Site("time/fc1", ("time", "fc1"), 2 * FREQUENCIES, (d,), "image"),
        Site("time/fc2", ("time", "fc2"), d, (d,), "image"),
        Site("final_adaln", ("final_adaln",), d, (2 * d,), "image"),
    ]
    for k, stage in enumerate(model.pyramid.stages):
        area, rows = stage.patch[0] * stage.patch[1], "attention"
        into, out = ("patchify", k), ("unpatchify", k)
        found.append(Site(f"patchify/{k}", into, area * channels, (d,), rows, k))
        found.append(Site(f"unpatchify/{k}", out, d, (area * out_channels,), rows, k))
    return tuple(found)


def _adaln(d: int) -> tuple[Site, ...]:
    gates = Site("blocks/gates", ("blocks",), 0, (2, d), "image", prefix="gates_")
    return Site("blocks/adaln", ("blocks", "adaln"), d, (6 * d,), "image"), gates


class Beside(NamedTuple):
    """What stands beside one kernel: names of leaves without the site's prefix, rank and s."""

    site: Site
    names: tuple[str, ...]
    rank: int
    factor: float

    def shape(self, name: str, depth: int) -> tuple[int, ...]:
        layers = (depth,) if self.site.module[0] == "blocks" else ()
        low = {"lora_a": (self.site.inputs, self.rank), "lora_b": (self.rank, *self.site.outputs)}
        return layers + low.get(name, self.site.outputs)

    def path(self, name: str) -> Path:
        return (*self.site.module, self.site.prefix + name)


def beside(model: ModelConfig) -> tuple[Beside, ...]:
    """All adapters of a model, one entry for every site that has any.

    Raises:
      InputError: a pattern that no site has, or a leaf that two adapters have.
    """
    found: dict[str, Beside] = {}
    every = sites(model)
    for adapter in model.adapters:
        able = [s for s in every if s.inputs or adapter.kind == "scale"]
        chosen = [s for s in able if re.fullmatch(adapter.on, s.name)]
        if not chosen:
            names = ", ".join(s.name for s in able)
            raise InputError(f"adapter {adapter}: on={adapter.on} is none of {names}")
        for site in chosen:
            old = found.get(site.name, Beside(site, (), 0, 1.0))
            if twice := set(old.names) & set(adapter.leaves):
                raise InputError(
                    f"adapters {text(model.adapters)}: two have {', '.join(sorted(twice))} on "
                    f"{site.name}: change the pattern of one"
                )
            low = "lora_a" in adapter.leaves
            rank, factor = (adapter.rank, adapter.factor) if low else (old.rank, old.factor)
            found[site.name] = Beside(site, old.names + adapter.leaves, rank, factor)
    return tuple(found.values())


def adapter_paths(model: ModelConfig) -> frozenset[Path]:
    """Of the leaves of all adapters of a model."""
    return frozenset(b.path(name) for b in beside(model) for name in b.names)


def attach(network: nnx.Module, model: ModelConfig, rngs: nnx.Rngs) -> None:
    """Give a network of `model` the leaves of its adapters; the others are drawn before them."""
    for b in beside(model):
        module: Any = network
        for name in b.site.module:
            module = module[name] if isinstance(name, int) else getattr(module, name)
        for name in b.names:
            leaf = nnx.Param(_fresh(name, b.shape(name, model.depth), rngs))
            setattr(module, b.site.prefix + name, leaf)
        if b.rank:
            setattr(module, b.site.prefix + "factor", b.factor)


def _fresh(name: str, shape: tuple[int, ...], rngs: nnx.Rngs) -> jax.Array:
    """A is drawn as PyTorch draws a linear layer, U(-1/sqrt(in), 1/sqrt(in)), as in peft."""
    if name == "lora_a":
        bound = shape[-2] ** -0.5
        return jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
    return jnp.ones(shape) if name == "gamma" else jnp.zeros(shape)


def plain(model: ModelConfig) -> ModelConfig:
    """The model without adapters."""
    return replace(model, adapters=())


def merge(model: ModelConfig, params: Tree) -> Tree:
    """Parameters of `plain(model)` that compute the same: NumPy arrays, in their dtypes.

    W' = gamma W + s A B and b' = gamma b + beta. Gates belong to the kernel of adaLN.
    """
    own = adapter_paths(model)
    out = parted(jax.tree.map(np.asarray, params), lambda path: path not in own)[0]
    for b in sorted(beside(model), key=lambda b: b.site.name == "blocks/gates"):
        leaf = {n: np.float32(np.asarray(at(params, b.path(n)))) for n in b.names}
        if b.site.inputs:
            _fold(out, b, leaf)
        else:
            _fold_gates(out, leaf["gamma"])
    return out


def _fold(out: Tree, b: Beside, leaf: dict[str, np.ndarray]) -> None:
    kernel, bias = (at(out, b.path(name)) for name in ("kernel", "bias"))
    w, c = np.float32(kernel), np.float32(bias)
    if "gamma" in leaf:
        # one more axis, of what enters, before those of what leaves
        w = w * np.expand_dims(leaf["gamma"], leaf["gamma"].ndim - len(b.site.outputs))
        c = c * leaf["gamma"]
    if "beta" in leaf:
        c = c + leaf["beta"]
    if "lora_a" in leaf:
        low = leaf["lora_b"].reshape(*leaf["lora_a"].shape[:-2], b.rank, -1)
        w = w + np.float32(b.factor) * (leaf["lora_a"] @ low).reshape(w.shape)
    put(out, b.path("kernel"), w.astype(kernel.dtype))
    put(out, b.path("bias"), c.astype(bias.dtype))


def _fold_gates(out: Tree, gamma: np.ndarray) -> None:
    layers, _, d = gamma.shape
    scale = np.ones((layers, 6, d), np.float32)
    scale[:, [2, 5]] = gamma
    scale = scale.reshape(layers, 6 * d)
    adaln = out["blocks"]["adaln"]
    kernel, bias = adaln["kernel"], adaln["bias"]
    adaln["kernel"] = (np.float32(kernel) * scale[:, None]).astype(kernel.dtype)
    adaln["bias"] = (np.float32(bias) * scale).astype(bias.dtype)


def low_rank_flops(model: ModelConfig, stage: int, attention: int, mlp: int) -> tuple[int, int]:
    """FLOPs of the products with A and B for one image, in one block and outside of the blocks.

    `attention` and `mlp` are the tokens that enter those branches.
    """
    rows = {"attention": attention, "mlp": mlp, "image": 1}
    found = {True: 0, False: 0}
    for b in beside(model):
        if b.site.stage in (None, stage):
            products = b.rank * (b.site.inputs + math.prod(b.site.outputs))
            found[b.site.module[0] == "blocks"] += 2 * rows[b.site.rows] * products
    return found[True], found[False]
