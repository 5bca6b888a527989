"""PyTorch names of the autoencoders' weights <-> the paths of our parameters, both ways.

Names are derived from our own tree by short rules, so no parameter can be forgotten. Three
namings of AutoencoderKL are read and written: `diffusers`, `legacy` (diffusers before 0.15:
attention called query/key/value/proj_attn) and `compvis` (the original latent-diffusion code).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from ppflow_jax.autoencoders.autoencoder import Autoencoder, Config, Params
from ppflow_jax.autoencoders.autoencoder_kl import AutoencoderKLConfig
from ppflow_jax.autoencoders.taesd import TAESDConfig
from ppflow_jax.convert.fill import State, fill, leaves, to_torch
from ppflow_jax.errors import InputError

Kind = Literal["vae", "taesd"]

# (pattern over our dotted path, replacement); applied in order, each wherever it matches.
_COMMON = [
    (r"^encoder\.quant_conv", "quant_conv"),
    (r"^decoder\.post_quant_conv", "post_quant_conv"),
    (r"\.(kernel|scale)$", ".weight"),
]
_DIFFUSERS = [
    *_COMMON,
    (r"\.(down|up)_(\d+)\.", r".\1_blocks.\2."),
    (r"\.mid\.", ".mid_block."),
    (r"\.resnet_(\d+)\.", r".resnets.\1."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.(down|up)sample\.", r".\1samplers.0.conv."),
    (r"\.attention\.norm\.", ".attention.group_norm."),
    (r"\.attention\.", ".attentions.0."),
]
_RULES = {
    "diffusers": [
        *_DIFFUSERS,
        (r"\.attentions\.0\.([qkv])\w+\.", r".attentions.0.to_\1."),
        (r"\.attentions\.0\.out\.", ".attentions.0.to_out.0."),
    ],
    "legacy": [*_DIFFUSERS, (r"\.attentions\.0\.out\.", ".attentions.0.proj_attn.")],
    "compvis": [
        *_COMMON,
        (r"\.mid\.resnet_0\.", ".mid.block_1."),
        (r"\.mid\.resnet_1\.", ".mid.block_2."),
        (r"\.(down|up)_(\d+)\.", r".\1.\2."),
        (r"\.resnet_(\d+)\.", r".block.\1."),
        (r"\.shortcut\.", ".nin_shortcut."),
        (r"\.(down|up)sample\.", r".\1sample.conv."),
        (r"\.attention\.", ".attn_1."),
        (r"\.attn_1\.([qkv])\w+\.", r".attn_1.\1."),
        (r"\.attn_1\.out\.", ".attn_1.proj_out."),
    ],
}
# Deliberately not read: training losses (with their own networks) and the EMA shadow that the
# CompVis trainer keeps beside the weights.
DROPPED = (r"^loss\.", r"^model_ema\.")

# TAESD is an nn.Sequential: our module -> its number there (Clamp, ReLU and Upsample count too).
_TAESD_INDEX = {
    "encoder": {
        "conv_in": 0,
        "block_in": 1,
        **{f"stage_{s}.resample": 2 + 4 * s for s in range(3)},
        **{f"stage_{s}.block_{j}": 3 + 4 * s + j for s in range(3) for j in range(3)},
        "conv_out": 14,
    },
    "decoder": {
        "conv_in": 1,
        **{f"stage_{s}.block_{j}": 3 + 5 * s + j for s in range(3) for j in range(3)},
        **{f"stage_{s}.resample": 7 + 5 * s for s in range(3)},
        "block_out": 18,
        "conv_out": 19,
    },
}


def _vae_names(path: str, levels: int) -> dict[str, str]:
    names = {}
    for naming, rules in _RULES.items():
        name = path
        if naming == "compvis":  # numbers the decoder's levels from fine to coarse
            name = re.sub(r"\.up_(\d+)\.", lambda m: f".up_{levels - 1 - int(m[1])}.", name)
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        names[naming] = name
    return names


def _taesd_names(path: str) -> dict[str, str]:
    half, rest = path.split(".", 1)
    rest, leaf = rest.rsplit(".", 1)
    suffix = "bias" if leaf == "bias" else "weight"
    if match := re.fullmatch(r"(.*block_\w+)\.conv_(\d)", rest):
        rest, suffix = match[1], f"conv.{2 * int(match[2])}.{suffix}"
    index = _TAESD_INDEX[half][rest]
    # diffusers' AutoencoderTiny keeps the decoder's clamp outside the sequence.
    layer = index - (half == "decoder")
    return {
        "taesd": f"{half}.{index}.{suffix}",
        "diffusers": f"{half}.layers.{layer}.{suffix}",
    }


def key_table(kind: Kind, params: Params) -> dict[str, dict[str, str]]:
    """Our dotted path -> its PyTorch name in every naming, for the leaves of `params`."""
    paths = [path for path, _ in leaves(params)]
    if kind == "taesd":
        return {path: _taesd_names(path) for path in paths}
    levels = len({m[1] for path in paths if (m := re.match(r"decoder\.up_(\d+)\.", path))})
    return {path: _vae_names(path, levels) for path in paths}


def autoencoder_kind(state: State) -> Kind:
    """Which autoencoder these keys belong to. Raises `InputError` for neither."""
    starts = ("quant_conv", "post_quant_conv", "encoder.conv_in", "decoder.conv_in")
    if any(f"{start}.weight" in state for start in starts):
        return "vae"
    tiny = re.compile(r"((en|de)coder\.(layers\.)?)?\d+\.conv\.\d\.weight")
    if any(tiny.fullmatch(key) for key in state):
        return "taesd"
    raise InputError(
        "these weights are no autoencoder that is known here (AutoencoderKL, TAESD); "
        f"their first keys: {', '.join(list(state)[:5]) or 'none'}"
    )


def autoencoder_config(
    kind: Kind, state: State, diffusers_config: Mapping[str, Any] | None = None
) -> Config:
    """The architecture, read from names and shapes (or from a diffusers `config.json`).

    Not in the weights: the number of normalisation groups (32 is assumed) and the latent scale
    (0.18215 is assumed); both are in `config.json`. Raises `InputError` where keys are missing.
    """
    if kind == "taesd":
        state = _with_halves(state)
        table = key_table("taesd", Autoencoder(TAESDConfig()).abstract_params())
        first = {path: [n for n in names.values() if n in state] for path, names in table.items()}

        def shape(path: str, axis: int, default: int) -> int:
            found = first[path + ".kernel"]
            return _side(state, found[0], axis) if found else default

        latent = shape("decoder.conv_in", 1, shape("encoder.conv_out", 0, 4))
        return TAESDConfig(
            in_channels=shape("encoder.conv_in", 1, 3),
            out_channels=shape("decoder.conv_out", 0, 3),
            latent_channels=latent,
            width=shape("decoder.conv_in", 0, shape("encoder.conv_in", 0, 64)),
        )
    if not {"quant_conv.weight", "post_quant_conv.weight"} & set(state):
        raise InputError(
            "an AutoencoderKL without quant_conv is of the SD3/FLUX kind (16 channels, latents "
            "with a shift factor), which is not supported; expected one of the Stable Diffusion "
            "kind, such as sd-vae-ft-ema"
        )
    if diffusers_config is not None:
        return AutoencoderKLConfig.from_diffusers(diffusers_config)
    pattern = r"encoder\.down(?:_blocks)?\.(\d+)\.(?:resnets|block)\.(\d+)\.conv1\.weight"
    blocks = {(int(m[1]), int(m[2])): key for key in state if (m := re.fullmatch(pattern, key))}
    needed = ["encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"]
    missing = [key for key in needed if key not in state]
    levels = 1 + max((i for i, _ in blocks), default=-1)
    if missing or any((i, 0) not in blocks for i in range(levels)) or not levels:
        raise InputError(
            "the AutoencoderKL architecture cannot be read from these weights: needed are "
            f"{', '.join(needed)} and encoder.down_blocks.*.resnets.*.conv1.weight (diffusers "
            f"names) or encoder.down.*.block.*.conv1.weight (CompVis names); missing: "
            f"{', '.join(missing) or 'residual blocks of the encoder'}"
        )
    return AutoencoderKLConfig(
        in_channels=_side(state, needed[0], 1),
        out_channels=_side(state, needed[2], 0),
        block_out_channels=tuple(_side(state, blocks[i, 0], 0) for i in range(levels)),
        layers_per_block=1 + max(j for i, j in blocks if i == 0),
        latent_channels=_side(state, needed[1], 1),
    )


def autoencoder_params(kind: Kind, state: State, config: Config | None = None) -> Params:
    """Parameters (nested dict of float32 NumPy arrays) from a PyTorch state dict.

    A TAESD file may hold one half with bare names (`0.weight`) or both with the prefixes
    `encoder.` and `decoder.`; the result has the halves that the file has.

    Strict: every key is used or matches `DROPPED`, every parameter is filled exactly once, shapes
    agree and values are finite. Raises one `InputError` that lists all mismatches.
    """
    config = config or autoencoder_config(kind, state)
    if kind == "taesd":
        state = _with_halves(state)
    target = Autoencoder(config).abstract_params()
    if kind == "taesd":
        halves = {key.split(".", 1)[0] for key in state}
        target = {half: tree for half, tree in target.items() if half in halves}
    table = key_table(kind, target)

    return fill(target, table, state, config, dropped=_dropped)


def dropped_keys(state: State) -> list[str]:
    """The keys of an AutoencoderKL file that `autoencoder_params` deliberately leaves out."""
    return [key for key in state if _dropped(key)]


def autoencoder_state(
    kind: Kind, params: Params, names: str | None = None
) -> dict[str, np.ndarray]:
    """The reverse: a state dict in PyTorch's names and layouts.

    `names` is `diffusers` (default), `legacy` or `compvis` for AutoencoderKL and `taesd`
    (default, with the prefixes `encoder.` and `decoder.`) or `diffusers` for TAESD.
    """
    names = names or ("taesd" if kind == "taesd" else "diffusers")
    table = key_table(kind, params)
    choices = list(next(iter(table.values())))
    if names not in choices:
        raise InputError(f"names={names!r} is unknown for {kind}; choose from {', '.join(choices)}")
    state = {}
    for path, leaf in leaves(params):
        array = to_torch(np.asarray(leaf))
        if names == "compvis" and ".attention." in path and path.endswith(".kernel"):
            array = array[:, :, None, None]
        state[table[path][names]] = array
    return state


def _side(state: State, key: str, axis: int) -> int:
    """One side of a convolution's OIHW weight."""
    shape = np.shape(state[key])
    if len(shape) != 4:
        raise InputError(f"{key} has shape {shape}; a convolution has four axes (OIHW)")
    return shape[axis]


def _with_halves(state: State) -> State:
    """Give the bare names of a single TAESD file their prefix; only an encoder starts at 0."""
    if any(key.startswith(("encoder.", "decoder.")) for key in state):
        return state
    half = "encoder" if "0.weight" in state else "decoder"
    return {f"{half}.{key}": value for key, value in state.items()}


def _dropped(key: str) -> bool:
    return any(re.match(pattern, key) for pattern in DROPPED)
