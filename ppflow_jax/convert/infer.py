"""What a state dict is: kind and architecture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ppflow_jax.convert.autoencoder_keys import autoencoder_kind
from ppflow_jax.convert.inception_keys import is_inception
from ppflow_jax.errors import InputError
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.parts import BlockSpec
from ppflow_jax.models.students import read_students
from ppflow_jax.models.torch_keys import lacking
from ppflow_jax.pyramid import PPFLOW2, PPFLOW3, Pyramid, Stage
from ppflow_jax.systems.registry import read_block, read_conditions, read_network, take_block

KINDS = ("sit", "ppflow", "vae", "taesd", "inception")
_DIMS = {
    "x_embedder.proj.weight": 4,
    "final_layer.linear.weight": 2,
    "y_embedder.embedding_table.weight": 2,
}
HEADS = {size["width"]: size["heads"] for size in SIZES.values()}


def find_kind(state: Mapping[str, Any]) -> str:
    """One of `KINDS`, from the names.

    Raises:
      InputError: none of them.
    """
    if any(name.startswith(("x_embedder.", "final_layer.", "blocks.0.")) for name in state):
        several = ("level_embedder.", "pos_embed.", "x_embedder.proj1.", "final_layer.linear1.")
        return "ppflow" if any(name.startswith(several) for name in state) else "sit"
    if is_inception(state):
        return "inception"
    try:
        return autoencoder_kind(state)
    except InputError as error:
        raise InputError(
            "is none of SiT, PPFlow, DiCo, AutoencoderKL, TAESD, Inception; its first names: "
            f"{', '.join(list(state)[:4])}"
        ) from error


def find_config(
    state: Mapping[str, Any],
    kind: str,
    *,
    pyramid: Pyramid | None = None,
    heads: int | None = None,
    latent_size: int | None = None,
    ffn: str | None = None,
    mixer: str | None = None,
    network: str | None = None,
) -> ModelConfig:
    """Architecture of a SiT or PPFlow state dict, or of another network, from names and shapes.

    Args:
      state: by PyTorch name.
      kind: `sit` or `ppflow`.
      pyramid: of a PPFlow file, where it is not the public one.
      heads: where the width is not a public one.
      latent_size: where the file has no positions.
      ffn, mixer, network: of which the names do not tell all.

    Raises:
      InputError: what cannot be found, or does not agree.
    """
    own: dict[str, Any] = {}
    backbone = read_network(state, own, network)
    if backbone is not None and not backbone.trunk:
        own |= {"latent_size": latent_size or _latent_size(state, "pos_embed", 1)}
        own |= {"heads": heads} if heads else {}
        return ModelConfig(**own, block=_said(ffn, mixer), network=backbone)
    (width, channels, *base), rows = _ends(state, kind)
    area = math.prod(base)
    several = kind == "ppflow" and _pyramid(state, channels, tuple(base), pyramid)
    found = several or Pyramid((Stage(1.0, tuple(base)),))
    last = "pos_embed" if kind == "sit" else f"pos_embed.{len(found) - 1}"
    own = {"width": width, "depth": _blocks(state), "heads": heads} | own
    block, hidden = read_block(state, own["width"], ffn, mixer)
    return ModelConfig(
        pyramid=found,
        latent_size=latent_size or _latent_size(state, last, area),
        channels=channels,
        width=own["width"],
        depth=own["depth"],
        heads=heads or own["heads"] or _heads(own["width"]),
        num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
        mlp_ratio=_ratio(hidden, own["width"]),
        learn_sigma=rows == 2 * area * channels,
        block=block,
        conditions=read_conditions(state, found),
        network=backbone,
        students=read_students(state),
    )


def _ends(state: Mapping[str, Any], kind: str) -> tuple[tuple[int, ...], int]:
    """Shape of the last stage's patch projection, and rows of its final one."""
    if missing := lacking(state, _DIMS):
        raise InputError(
            f"the architecture of a {kind} model cannot be read from this file: it needs "
            f"{', '.join(missing)}"
        )
    shape = state["x_embedder.proj.weight"].shape
    _, channels, *base = shape
    area = math.prod(base)
    rows = state["final_layer.linear.weight"].shape[0]
    if rows not in (area * channels, 2 * area * channels):
        raise InputError(
            f"final_layer.linear.weight has {rows} rows; {base[1]}x{base[0]} patches of {channels} "
            f"channels need {area * channels}, or twice as many with learn_sigma"
        )
    return shape, rows


def _said(ffn: str | None, mixer: str | None) -> BlockSpec:
    """The parts that a person names."""
    return take_block({"ffn": ffn or "mlp", "mixer": mixer or "attention"})


def _blocks(state: Mapping[str, Any]) -> int:
    return len({m[1] for name in state if (m := re.match(r"blocks\.(\d+)\.", name))})


def _heads(width: int) -> int:
    if width not in HEADS:
        raise InputError(
            f"the number of attention heads is not in the file, and width {width} is not that of "
            "a public model: say it with --heads=N"
        )
    return HEADS[width]


def _ratio(hidden: int, width: int) -> float:
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _latent_size(state: Mapping[str, Any], name: str, area: int) -> int:
    if name not in state or len(state[name].shape) != 3:
        raise InputError(
            f"the latent size cannot be read, because {name} is not in the file: say it with "
            "--latent_size=32 (256-pixel images)"
        )
    tokens = state[name].shape[1]
    size = math.isqrt(tokens * area)
    if size * size != tokens * area:
        raise InputError(f"{name} has {tokens} tokens, which is no square latent")
    return size


def _pyramid(
    state: Mapping[str, Any], channels: int, base: tuple[int, int], given: Pyramid | None
) -> Pyramid:
    """Stages of a PPFlow file: the public ones by their channels, or those the user states."""
    names = [n for n in state if re.fullmatch(r"x_embedder\.proj\d+\.weight", n)]
    levels = len(names) + 1
    factors = []
    for k in range(1, levels):
        ref = state.get(f"x_embedder.proj{k}.weight")
        if ref is None or len(ref.shape) != 4 or ref.shape[1] % channels:
            raise InputError(
                f"the pyramid cannot be read: x_embedder.proj{k}.weight is missing or not a "
                f"convolution of a multiple of {channels} channels; there are {', '.join(names)}"
            )
        factors.append(ref.shape[1] // channels)
    factors.append(1)
    if given:
        areas = [s.patch[0] * s.patch[1] for s in given.stages]
        if given.stages[-1].patch != base or areas != [f * math.prod(base) for f in factors]:
            raise InputError(
                f"--pyramid={given} is not that of the file, which has {levels} level(s) whose "
                f"patches have {', '.join(str(f * math.prod(base)) for f in factors)} latent "
                f"pixels, the last {base[1]}x{base[0]}; only a one-stage model can be expanded"
            )
        return given
    for public in (PPFLOW2, PPFLOW3):
        unit = public.stages[-1].patch
        scales = [(s.patch[0] // unit[0], s.patch[1] // unit[1]) for s in public.stages]
        if [i * j for i, j in scales] == factors:
            ends = [s.t_end for s in public.stages]
            patches = [(base[0] * i, base[1] * j) for i, j in scales]
            return Pyramid(tuple(map(Stage, ends, patches)))
    raise InputError(
        f"{levels} level(s) with {', '.join(map(str, factors))} times the channels of the last are "
        "not a public pyramid: say its patches and times, e.g. --pyramid=8x8@0.5,2x2@1"
    )
