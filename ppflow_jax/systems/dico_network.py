"""The network of DiCo (arXiv 2505.11196): a U of convolutions without attention.

Five levels of blocks, each adaLN-Zero around DiCo's mixer (`systems.dico`) and an MLP with the
exact gelu, of widths h, 2h, 4h, 2h, 2h on grids of 1, 1/2, 1/4, 1/2, 1 of the latent's:

    x -> 3x3 -> encoder1 -> down -> encoder2 -> down -> latent -> up, join -> decoder2
      -> up, join -> decoder1 -> adaLN -> 3x3

Down is a 3x3 convolution to half of the channels and pixel-unshuffle, up one to twice as many and
pixel-shuffle; join is a 1x1 convolution of what came up beside what the encoder had on that grid.
Time and label are embedded once for each of the widths h, 2h, 4h.

The paper has one stage of 1x1 patches. Here a stage has its own first and last convolution, which
see the pixels of a patch as channels, and a level embedding: nothing else depends on the grid.

The public weights predict the noise of DDPM and are told its step, n of 1000: `time=ddpm`. Along
the path `vp`, which is that process in continuous time, t is then given to the network as the n of
equal signal-to-noise ratio. `time=flow` gives it t itself, along the other paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import PartitionSpec as P

from ppflow_jax.errors import InputError
from ppflow_jax.models.backbone import Backbone
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import FREQUENCIES
from ppflow_jax.models.leaves import Key, linear_keys
from ppflow_jax.models.parts import DIT, BlockSpec
from ppflow_jax.models.torch_keys import lacking
from ppflow_jax.pyramid import Pyramid, Stage
from ppflow_jax.systems.dico import DiCo, ExactMlp, point_keys
from ppflow_jax.systems.dico_unet import JOINS, LEVELS, MOVES, WIDTHS, UNet, moved, stack

# DiCo, Table 2: width h and blocks of the levels; H has an MLP of 4 times the width, the others 2.
SIZES = {
    "S": dict(width=128, depths=(5, 4, 4, 4, 4), mlp_ratio=2.0),
    "B": dict(width=256, depths=(5, 4, 4, 4, 4), mlp_ratio=2.0),
    "L": dict(width=352, depths=(9, 8, 9, 8, 9), mlp_ratio=2.0),
    "XL": dict(width=416, depths=(9, 9, 10, 9, 9), mlp_ratio=2.0),
    "H": dict(width=416, depths=(14, 12, 10, 12, 14), mlp_ratio=4.0),
}
BLOCK = BlockSpec(ffn=ExactMlp(), mixer=DiCo())
TIMES = {"flow": ("linear", "gvp"), "ddpm": ("vp",)}  # with the paths along which they are meant


@dataclass(frozen=True)
class DiCoNetwork(Backbone):
    """`config.model.network=dico:depths=5/4/4/4/4`: width is h, depth all blocks, heads 1.

    Attributes:
      depths: blocks of the five levels.
      time: what the network is told of t: `flow` t itself, `ddpm` the step of DDPM.
    """

    depths: tuple[int, ...] = SIZES["S"]["depths"]
    time: str = "flow"

    kind = "dico"
    trunk = False
    rules = (
        *DiCo.rules,
        (r"time/\d/fc[12]/kernel$", P(None, "fsdp")),
        (r"label/\d/embedding$", P(None, "fsdp")),
        (r"join[12]/kernel$", P(None, "fsdp")),
        (r"(down|up)[12]/kernel$", P(None, None, None, "fsdp")),
    )
    matrices = (
        *((rf"\w+_{pattern}", *axes) for pattern, *axes in DiCo.matrices),
        (r"\w+_blocks/fc[12]/kernel$", (1,), (2,)),
    )

    def __post_init__(self):
        if len(self.depths) != len(LEVELS) or min(self.depths) < 1:
            raise InputError(
                f"{self}: depths are the blocks of {len(LEVELS)} levels, at least 1 each, as "
                f"{'/'.join(map(str, SIZES['S']['depths']))}"
            )
        if self.time not in TIMES:
            raise InputError(f"{self}: time is one of {', '.join(TIMES)}")

    def check(self, model: ModelConfig) -> None:
        lacks = {
            "ffn, mixer, wrap and norm": model.block != DIT,
            "conditions": bool(model.conditions),
            "adapters": bool(model.adapters),
        }
        if has := next((name for name, there in lacks.items() if there), None):
            raise InputError(
                f"config.model.{has}: these are of the transformer, not of {self.kind}: leave "
                "them out, and config.data.task too, or leave config.model.network=none"
            )
        if (model.depth, model.heads) != (sum(self.depths), 1):
            raise InputError(
                f"{self} has {sum(self.depths)} blocks and no heads: set config.model.depth="
                f"{sum(self.depths)} (not {model.depth}) and config.model.heads=1 (not "
                f"{model.heads})"
            )
        for stage in range(len(model.pyramid)):
            rows, cols = model.pyramid.grid(stage, model.latent_size)
            if rows % 4 or cols % 4:
                raise InputError(
                    f"{self}: stage {stage} has a grid of {rows}x{cols}, which is halved twice: "
                    "choose patches, such as 1x1, that leave a multiple of 4"
                )

    def check_path(self, path: str) -> None:
        if path not in TIMES[self.time]:
            other = next((time for time in TIMES if path in TIMES[time]), self.time)
            raise InputError(
                f"{self} is for config.flow.path={' or '.join(TIMES[self.time])}, not {path}: "
                f"choose that path, or time={other}"
            )

    def module(self, model: ModelConfig, **options: Any) -> UNet:
        return UNet(model, self, **options)

    def level(self, model: ModelConfig, name: str) -> ModelConfig:
        """The blocks of one level as those of a model."""
        depth = dict(zip(LEVELS, self.depths))[name]
        width = LEVELS[name].widths * model.width
        size = model.latent_size // LEVELS[name].shrink
        sizes = dict(latent_size=size, width=width, depth=depth)
        return replace(model, **sizes, block=BLOCK, network=None)

    def stacks(self, model: ModelConfig) -> tuple[ModelConfig, ...]:
        return tuple(self.level(model, name) for name in LEVELS)

    def ends_flops(self, model: ModelConfig, stage: int) -> int:
        rows, cols = model.pyramid.grid(stage, model.latent_size)
        n, h, patch = rows * cols, model.width, model.pyramid.stages[stage].patch
        pixels = patch[0] * patch[1] * model.channels
        total = 18 * n * h * pixels + 36 * n * h * pixels * (1 + model.learn_sigma)
        total += sum(2 * w * h * (2 * FREQUENCIES + w * h) for w in WIDTHS) + 16 * h * h
        total += sum(18 * n * a * h * moved(name, a * h) // s**2 for name, _, a, s in MOVES)
        return total + sum(2 * n * a * b * h * h // s**2 for *_, a, b, s in JOINS)

    def flow(self, model: ModelConfig) -> dict[str, Any]:
        return {"path": "vp", "prediction": "noise"} if self.time == "ddpm" else {}

    def keys(self, model: ModelConfig) -> Iterator[Key]:
        if str(model.pyramid) != "1x1@1":
            raise InputError(
                f"dico with stages {model.pyramid} has no PyTorch layout: the original has 1x1@1"
            )
        yield from _conv_keys("x_embedder.proj", "patchify", 0)
        for k in range(len(WIDTHS)):
            for i, fc in ((0, "fc1"), (2, "fc2")):
                yield from linear_keys(f"t_embedder_{k + 1}.mlp.{i}", "time", k, fc)
            yield Key(f"y_embedder.embedding_table_{k}.weight", ("label", k, "embedding"))
        for name, torch, *_ in MOVES:
            yield from _conv_keys(torch, name, bias=False)
        for name, torch, *_ in JOINS:
            yield from point_keys(torch, name)
        for name, depth in zip(LEVELS, self.depths):
            for layer in range(depth):
                yield from _block_keys(name, layer)
        yield from linear_keys("final_layer.adaLN_modulation.1", "final_adaln")
        yield from _conv_keys("final_layer.out_proj", "unpatchify", 0)

    @classmethod
    def read(
        cls, state: Mapping[str, Any], model: dict[str, Any], said: Backbone | None
    ) -> DiCoNetwork | None:
        """Depths and sizes; `time` is that of public weights, where it is not said."""
        first, last = "x_embedder.proj.weight", "final_layer.out_proj.weight"
        table, hidden = "y_embedder.embedding_table_0.weight", "encoder_level_1.0.conv4.weight"
        if hidden not in state:
            return None
        if missing := lacking(state, {first: 4, last: 4, table: 2, hidden: 4}):
            raise InputError(
                "the architecture of a dico model cannot be read from this file: it needs "
                f"{', '.join(missing)}"
            )
        depths = tuple(_blocks(state, level.torch) for level in LEVELS.values())
        width, channels = state[first].shape[:2]
        model |= dict(
            pyramid=Pyramid((Stage(1.0, (1, 1)),)),
            channels=channels,
            width=width,
            depth=sum(depths),
            heads=1,
            num_classes=state[table].shape[0] - 1,
            mlp_ratio=state[hidden].shape[0] / width,
            learn_sigma=state[last].shape[0] == 2 * channels,
        )
        return cls(depths, said.time if isinstance(said, DiCoNetwork) else "ddpm")


def _blocks(state: Mapping[str, Any], level: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"{level}.")})


def _conv_keys(torch: str, *path: str | int, bias: bool = True) -> Iterator[Key]:
    ours, theirs = (lambda x: x.transpose(2, 3, 1, 0)), (lambda x: x.transpose(3, 2, 0, 1))
    yield Key(f"{torch}.weight", (*path, "kernel"), (), ours, theirs)
    if bias:
        yield Key(f"{torch}.bias", (*path, "bias"))


def _block_keys(name: str, layer: int) -> Iterator[Key]:
    """Of one block: those of its parts, below the name of its level."""
    own = linear_keys(f"blocks.{layer}.adaLN_modulation.1", "blocks", "adaln", index=(layer,))
    for key in (*BLOCK.keys(layer), *own):
        torch = LEVELS[name].torch + key.torch.removeprefix("blocks")
        yield key._replace(torch=torch, path=(stack(name), *key.path[1:]))
