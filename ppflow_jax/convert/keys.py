"""Key tables: names and layouts of the PyTorch SiT / PPFlow state dict <-> our parameters.

`convert.load` fills parameters from a file by these tables, strictly.

The PyTorch code shuffles a coarse patch's pixels into channels before a convolution of the base
patch, and writes the mirror image of that on the way out; here a patch is one matrix product on
its pixels, so the tables reorder rows and columns. Every entry is a bijection of the elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import einops
import numpy as np
from jaxtyping import Float

from ppflow_jax.errors import InputError
from ppflow_jax.models.adapters import beside
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.leaves import Key, linear_keys
from ppflow_jax.models.network import Params
from ppflow_jax.models.patch import positions


def key_table(config: ModelConfig) -> tuple[Key, ...]:
    """Every trainable tensor of the PyTorch state dict of this architecture.

    Raises:
      InputError: a patch is no multiple of the last stage's, which that layout needs; see
        `Backbone.keys`.
    """
    table: list[Key] = []
    if config.network is not None:
        return tuple(config.network.keys(config))
    if len(config.pyramid) > 1 and not config.has_levels:
        raise InputError(
            "several stages without level embedding have no PyTorch layout: it always has the table"
        )
    out_channels = config.channels * (2 if config.learn_sigma else 1)
    base = config.pyramid.stages[-1].patch
    for stage, suffix in enumerate(_suffixes(config)):
        patch = config.pyramid.stages[stage].patch
        if patch[0] % base[0] or patch[1] % base[1]:
            raise InputError(
                f"pyramid {config.pyramid} has no PyTorch layout: it needs every patch to be a "
                f"multiple of the last one, {base[1]}x{base[0]}"
            )
        factor = dict(p=base[0], q=base[1], i=patch[0] // base[0], j=patch[1] // base[1])
        table += _patch(
            stage, suffix, factor | dict(c=config.channels), factor | dict(o=out_channels)
        )
    table += linear_keys("t_embedder.mlp.0", "time", "fc1")
    table += linear_keys("t_embedder.mlp.2", "time", "fc2")
    table.append(Key("y_embedder.embedding_table.weight", ("label", "embedding")))
    if config.has_levels:
        table.append(Key("level_embedder.embedding_table.weight", ("level", "embedding")))
    for layer in range(config.depth):
        if config.block.mixer.attends:
            table += _attention(config, layer)
        table += config.block.keys(layer)
        table += linear_keys(
            f"blocks.{layer}.adaLN_modulation.1", "blocks", "adaln", index=(layer,)
        )
    table += linear_keys("final_layer.adaLN_modulation.1", "final_adaln")
    for condition in config.conditions:
        table += condition.keys(config)
    table += _adapters(config, table)
    return tuple(table)


def _adapters(config: ModelConfig, table: list[Key]) -> list[Key]:
    """Leaves beside kernels: `NAME.lora_A.weight` [r, in] and `NAME.lora_B.weight` [out, r] as peft
    has them, and `NAME.gamma` and `NAME.beta`, for which there is no public format."""
    by_path = {(key.path, key.index): key for key in table}
    found = []
    for b in beside(config):
        layers = range(config.depth) if b.site.module[0] == "blocks" else (None,)
        for index in ((layer,) if layer is not None else () for layer in layers):
            if not b.site.inputs:
                found.append(Key(f"blocks.{index[0]}.gates.gamma", b.path("gamma"), index))
                continue
            kernel, bias = (by_path[b.path(name), index] for name in ("kernel", "bias"))
            # the kernel's layout is that of what enters for patches, of what leaves for all others
            patch = b.site.module[0] == "patchify"
            of = {"lora_a": patch, "lora_b": not patch}
            torch = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
            for name in b.names:
                key = bias if name not in torch else kernel if of[name] else _TRANSPOSED
                prefix = kernel.torch.removesuffix("weight")
                found.append(
                    key._replace(
                        torch=prefix + torch.get(name, name), path=b.path(name), index=index
                    )
                )
    return found


def _attention(config: ModelConfig, layer: int) -> Iterator[Key]:
    name, index, heads = f"blocks.{layer}", (layer,), dict(h=config.heads, c=3)
    yield Key(
        f"{name}.attn.qkv.weight",
        ("blocks", "attention", "qkv_kernel"),
        index,
        lambda x: einops.rearrange(x, "(c h e) d -> d c h e", **heads),
        lambda x: einops.rearrange(x, "d c h e -> (c h e) d"),
    )
    yield Key(
        f"{name}.attn.qkv.bias",
        ("blocks", "attention", "qkv_bias"),
        index,
        lambda x: einops.rearrange(x, "(c h e) -> c h e", **heads),
        np.ravel,
    )
    yield from linear_keys(f"{name}.attn.proj", "blocks", "attention", "out", index=index)


_TRANSPOSED = Key("", (), (), np.transpose, np.transpose)


def _suffixes(config: ModelConfig) -> tuple[str, ...]:
    """Suffix of each stage's projections: none for the last, 1, 2, ... from the coarsest."""
    return (*(str(i + 1) for i in range(len(config.pyramid) - 1)), "")


def _patch(stage: int, suffix: str, into: dict[str, int], out: dict[str, int]) -> Iterator[Key]:
    """Patch convolution [D, (c i j), p, q] and final projection [(p q o i j), D] of one stage."""
    name = f"x_embedder.proj{suffix}"
    yield Key(
        f"{name}.weight",
        ("patchify", stage, "kernel"),
        (),
        lambda x: einops.rearrange(x, "d (c i j) p q -> (p i q j c) d", **into),
        lambda x: einops.rearrange(x, "(p i q j c) d -> d (c i j) p q", **into),
    )
    yield Key(f"{name}.bias", ("patchify", stage, "bias"))
    name = f"final_layer.linear{suffix}"
    yield Key(
        f"{name}.weight",
        ("unpatchify", stage, "kernel"),
        (),
        lambda x: einops.rearrange(x, "(p q o i j) d -> d (p i q j o)", **out),
        lambda x: einops.rearrange(x, "d (p i q j o) -> (p q o i j) d", **out),
    )
    yield Key(
        f"{name}.bias",
        ("unpatchify", stage, "bias"),
        (),
        lambda x: einops.rearrange(x, "(p q o i j) -> (p i q j o)", **out),
        lambda x: einops.rearrange(x, "(p i q j o) -> (p q o i j)", **out),
    )


def position_names(config: ModelConfig) -> tuple[str, ...]:
    """Name of every stage's fixed positions in the state dict of SiT or PPFlow."""
    if config.network is not None:
        return ()
    if len(config.pyramid) == 1:
        return ("pos_embed",)
    return tuple(f"pos_embed.{stage}" for stage in range(len(config.pyramid)))


def position_values(config: ModelConfig, stage: int) -> Float[np.ndarray, "1 n d"]:
    """Positions of one stage as the state dict has them."""
    return positions(config.pyramid, stage, config.latent_size, config.width)[None]


def torch_tensors(
    config: ModelConfig, params: Params
) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Name and maker of every PyTorch tensor of our parameters, to be made one at a time."""
    for key in key_table(config):
        leaf = params
        for part in key.path:
            leaf = leaf[part]

        def make(leaf=leaf, key=key):
            return np.ascontiguousarray(key.theirs(np.asarray(leaf[key.index])))

        yield key.torch, make


def to_torch(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """PyTorch names and layouts of our parameters (or of anything shaped like them)."""
    return {name: make() for name, make in torch_tensors(config, params)}
