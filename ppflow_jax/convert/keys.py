"""Key tables: names and layouts of the PyTorch SiT / PPFlow state dict <-> our parameters.

The PyTorch code shuffles a coarse patch's pixels into channels before a convolution of the base
patch, and writes the mirror image of that on the way out; here a patch is one matrix product on
its pixels, so the tables reorder rows and columns. Every entry is a bijection of the elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import einops
import numpy as np

from ppflow_jax.models.ppflow import ModelConfig, Params


@dataclass(frozen=True)
class Entry:
    """One source tensor, our leaf (path and index in the stacked trunk) and both transforms."""

    torch: str
    path: tuple[str | int, ...]
    layer: int | None
    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


def _same(x):
    return x


def _transpose(x):
    return x.T


def key_table(config: ModelConfig) -> tuple[Entry, ...]:
    """Every trainable tensor of the PyTorch state dict of this architecture."""
    table: list[Entry] = []

    def add(torch, path, ours=_same, theirs=_same, layer=None):
        table.append(Entry(torch, path, layer, ours, theirs))

    def dense(torch, *path, layer=None):
        add(f"{torch}.weight", (*path, "kernel"), _transpose, _transpose, layer)
        add(f"{torch}.bias", (*path, "bias"), layer=layer)

    out_channels = config.channels * (2 if config.learn_sigma else 1)
    base = config.pyramid.stages[-1].patch
    for stage, suffix in enumerate(_suffixes(config)):
        patch = config.pyramid.stages[stage].patch
        factor = dict(p=base[0], q=base[1], i=patch[0] // base[0], j=patch[1] // base[1])
        _add_patch(
            add, stage, suffix, factor | dict(c=config.channels), factor | dict(o=out_channels)
        )
    dense("t_embedder.mlp.0", "time", "fc1")
    dense("t_embedder.mlp.2", "time", "fc2")
    add("y_embedder.embedding_table.weight", ("label", "embedding"))
    if len(config.pyramid) > 1:
        add("level_embedder.embedding_table.weight", ("level", "embedding"))
    heads = dict(h=config.heads, c=3)
    for i in range(config.depth):
        block = f"blocks.{i}"
        add(
            f"{block}.attn.qkv.weight",
            ("blocks", "attention", "qkv_kernel"),
            lambda x: einops.rearrange(x, "(c h e) d -> d c h e", **heads),
            lambda x: einops.rearrange(x, "d c h e -> (c h e) d"),
            i,
        )
        add(
            f"{block}.attn.qkv.bias",
            ("blocks", "attention", "qkv_bias"),
            lambda x: einops.rearrange(x, "(c h e) -> c h e", **heads),
            np.ravel,
            i,
        )
        dense(f"{block}.attn.proj", "blocks", "attention", "out", layer=i)
        dense(f"{block}.mlp.fc1", "blocks", "fc1", layer=i)
        dense(f"{block}.mlp.fc2", "blocks", "fc2", layer=i)
        dense(f"{block}.adaLN_modulation.1", "blocks", "adaln", layer=i)
    dense("final_layer.adaLN_modulation.1", "final_adaln")
    return tuple(table)


def _suffixes(config: ModelConfig) -> tuple[str, ...]:
    """Suffix of each stage's projections: none for the last, 1, 2, ... from the coarsest."""
    return (*(str(i + 1) for i in range(len(config.pyramid) - 1)), "")


def _add_patch(add, stage: int, suffix: str, into: dict[str, int], out: dict[str, int]) -> None:
    """Patch convolution [D, (c i j), p, q] and final projection [(p q o i j), D] of one stage."""
    name = f"x_embedder.proj{suffix}"
    add(
        f"{name}.weight",
        ("patchify", stage, "kernel"),
        lambda x: einops.rearrange(x, "d (c i j) p q -> (p i q j c) d", **into),
        lambda x: einops.rearrange(x, "(p i q j c) d -> d (c i j) p q", **into),
    )
    add(f"{name}.bias", ("patchify", stage, "bias"))
    name = f"final_layer.linear{suffix}"
    add(
        f"{name}.weight",
        ("unpatchify", stage, "kernel"),
        lambda x: einops.rearrange(x, "(p q o i j) d -> d (p i q j o)", **out),
        lambda x: einops.rearrange(x, "d (p i q j o) -> (p q o i j) d", **out),
    )
    add(
        f"{name}.bias",
        ("unpatchify", stage, "bias"),
        lambda x: einops.rearrange(x, "(p q o i j) -> (p i q j o)", **out),
        lambda x: einops.rearrange(x, "(p i q j o) -> (p q o i j)", **out),
    )


def from_torch(config: ModelConfig, state: dict[str, np.ndarray]) -> Params:
    """Our parameters from the tensors of a PyTorch state dict.

    Raises:
      KeyError: a tensor is missing.
    """
    params: Params = {}
    for entry in key_table(config):
        *parents, leaf = entry.path
        node = params
        for part in parents:
            node = node.setdefault(part, {})
        value = entry.ours(np.asarray(state[entry.torch]))
        if entry.layer is None:
            node[leaf] = value
        else:
            node.setdefault(leaf, []).append(value)
    blocks = params["blocks"]

    def stack(node):
        if isinstance(node, dict):
            return {k: stack(v) for k, v in node.items()}
        return np.stack(node)

    return params | {"blocks": stack(blocks)}


def to_torch(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """PyTorch names and layouts of our parameters (or of anything shaped like them)."""
    state = {}
    for entry in key_table(config):
        value = params
        for part in entry.path:
            value = value[part]
        value = np.asarray(value if entry.layer is None else value[entry.layer])
        state[entry.torch] = np.ascontiguousarray(entry.theirs(value))
    return state
