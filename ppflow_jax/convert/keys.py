"""Key tables: names and layouts of the PyTorch SiT / PPFlow state dict <-> our parameters.

`convert.load` fills parameters from a file by these tables, strictly.

Every entry is a bijection of the elements; of patches see `models.torch_keys`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float

from ppflow_jax.errors import InputError
from ppflow_jax.models.adapters import beside
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.leaves import Key, linear_keys
from ppflow_jax.models.network import Params
from ppflow_jax.models.patch import positions
from ppflow_jax.models.students import STUDENTS, blocks_of, ffns_of
from ppflow_jax.models.torch_keys import attention_keys, factors, final_keys, patch_keys


def key_table(config: ModelConfig) -> tuple[Key, ...]:
    """Every trainable tensor of the PyTorch state dict of this architecture.

    Raises:
      InputError: a patch is no multiple of the last stage's, which that layout needs.
    """
    table: list[Key] = []
    if len(config.pyramid) > 1 and not config.has_levels:
        raise InputError(
            "several stages without level embedding have no PyTorch layout: it always has the table"
        )
    if config.network is not None:
        return tuple(config.network.keys(config))
    out_channels = config.channels * (2 if config.learn_sigma else 1)
    for stage, (suffix, factor) in enumerate(factors(config.pyramid)):
        into, out = factor | dict(c=config.channels), factor | dict(o=out_channels)
        table += patch_keys(f"x_embedder.proj{suffix}", ("patchify", stage), into)
        table += final_keys(f"final_layer.linear{suffix}", ("unpatchify", stage), out)
    table += linear_keys("t_embedder.mlp.0", "time", "fc1")
    table += linear_keys("t_embedder.mlp.2", "time", "fc2")
    table.append(Key("y_embedder.embedding_table.weight", ("label", "embedding")))
    if config.has_levels:
        table.append(Key("level_embedder.embedding_table.weight", ("level", "embedding")))
    for layer in range(config.depth):
        table += _block(config, layer)
    table += linear_keys("final_layer.adaLN_modulation.1", "final_adaln")
    for condition in config.conditions:
        table += condition.keys(config)
    table += _students(config)
    table += _adapters(config, table)
    return tuple(table)


def _block(config: ModelConfig, layer: int) -> Iterator[Key]:
    if config.block.mixer.attends:
        yield from attention_keys(layer, config.heads)
    yield from config.block.keys(layer)
    if config.block.norm is None:
        name = f"blocks.{layer}.adaLN_modulation.1"
        yield from linear_keys(name, "blocks", "adaln", index=(layer,))


def _students(config: ModelConfig) -> Iterator[Key]:
    """A block's are below `students.STAGE_FIRST_LAST`; a linear map is `students.STAGE_ffnN`."""
    for row, s in enumerate(blocks_of(config.students)):
        for key in _block(config, row):
            name = key.torch.replace(f"blocks.{row}.", f"students.{s.stage}_{s.first}_{s.last}.")
            yield key._replace(torch=name, path=(STUDENTS, *key.path))
    for row, s in enumerate(ffns_of(config.students)):
        name = f"students.{s.stage}_ffn{s.first}"
        yield from linear_keys(name, STUDENTS, "residual", index=(row,))


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


_TRANSPOSED = Key("", (), (), np.transpose, np.transpose)


def position_names(config: ModelConfig) -> tuple[str, ...]:
    """Name of every stage's fixed positions in the state dict, or of what else is fixed there."""
    if config.network is not None:
        return tuple(config.network.tables(config))
    if len(config.pyramid) == 1:
        return ("pos_embed",)
    return tuple(f"pos_embed.{stage}" for stage in range(len(config.pyramid)))


def position_values(config: ModelConfig, stage: int) -> Float[np.ndarray, "... n d"]:
    """Those of one name of `position_names`, as the state dict has them."""
    if config.network is not None:
        return list(config.network.tables(config).values())[stage]
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
