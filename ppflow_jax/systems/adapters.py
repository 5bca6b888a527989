"""What the papers of parameter-efficient tuning add to a model, and what they train of it.

| preset | added beside the kernels | trained |
|---|---|---|
| full | | everything |
| lora (arXiv 2106.09685) | A, B in the blocks | these |
| bitfit (arXiv 2106.10199) | | biases, class table |
| difffit (arXiv 2304.06648) | gamma of q, k, v, attention, gates | these, biases, class table |
| diffscaler (arXiv 2404.09976) | gamma, beta, A, B of every layer | these, class table |

Besides, all of them train what belongs to a stage or a condition: patchify, unpatchify and the
level embedding, which a pyramid made from a SiT has to learn, and projections of conditions.

DiffFit: the paper does not say where its 0.83 M parameters are. These sites, 6 D in every block,
are those of the public port (0.80 M on DiT-XL/2 with 101 classes); 7 D, as with
`blocks/(attention/(qkv|out)|gates|fc2)`, give the paper's number. The port also trains the kernel
of adaLN, by the accident of a name; here it stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from ml_collections import ConfigDict

from ppflow_jax.errors import InputError
from ppflow_jax.models.adapters import NONE

STAGES = "(patchify|unpatchify|level|conditions)/.*"
CLASSES = "label/.*"


@dataclass(frozen=True)
class Preset:
    """A way to tune a model.

    Attributes:
      adapters: of `config.model.adapters`.
      trainable: of `config.train.trainable`, without what belongs to a stage.
    """

    adapters: str
    trainable: tuple[str, ...]


PRESETS = {
    "full": Preset(NONE, (".*",)),
    "lora": Preset("lora:rank=8,on=blocks/.*", (".*lora_[ab]",)),
    "bitfit": Preset(NONE, (".*bias", CLASSES)),
    "difffit": Preset(
        "scale:on=blocks/(attention/(qkv|out)|gates)", (".*gamma", ".*bias", CLASSES)
    ),
    "diffscaler": Preset("affiner:rank=8,on=.*", (".*(gamma|beta|lora_[ab])", CLASSES)),
}


def tune(config: ConfigDict, name: str) -> ConfigDict:
    """Give a configuration the adapters of a preset and what it trains.

    Raises:
      InputError: no preset of that name.
    """
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}: one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    config.model.adapters = preset.adapters
    stages = () if name == "full" else (STAGES,)
    config.train.trainable = preset.trainable + stages
    return config
