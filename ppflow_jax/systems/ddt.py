"""DiT^DH (RAE, arXiv 2510.11690, Sec. 5): a deep encoder and a short, wide head that predicts.

    c = silu(t + y),   s = encoder(embed(x) + positions; c),   s = W silu(t + s),
    v = head(embed'(x); s),

with a head of a width of its own, every token of which is modulated by the s of its place. The
encoder's blocks take SiLU of c once more. A velocity of n numbers a token has a covariance of rank
n, of which a head narrower than n cannot give all; so the head, not the encoder, must be wide.

Time enters as [sin, cos](2 pi (1 - t) w) of 256 frequencies w that are drawn once, N(0, 1), and are
kept with the weights; the original counts time from data, 1 - t of ours, and predicts the negative
of our velocity, which conversion turns round.

Of a pyramid every stage has patch projections of its own, in encoder and head, a final projection,
and a level embedding that is added to that of time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec as P

from ppflow_jax.errors import InputError
from ppflow_jax.flow.times import BASE_NUMBERS, shift_of
from ppflow_jax.models.backbone import Backbone
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.leaves import Key, linear_keys
from ppflow_jax.models.parts import Mlp
from ppflow_jax.models.patch import positions
from ppflow_jax.models.torch_keys import attention_keys, factors, final_keys, lacking, patch_keys
from ppflow_jax.systems.ddt_blocks import RopeAttention, SwiGlu, angles
from ppflow_jax.systems.ddt_network import FOURIER, WideHead

HEAD, HEADS = 2048, 16  # of the public models
_DEPTH = 2


@dataclass(frozen=True)
class DDT(Backbone):
    """The network; `width`, `depth` and `heads` of the model are its encoder's.

    Attributes:
      width, depth, heads: of its head.
      rms: norms are RMSNorm with learned weights, else LayerNorm without.

    Raises:
      InputError: sizes out of their range; in `check`, other parts than it is made of, or a head
        narrower than the tokens of a stage have numbers.
    """

    width: int = HEAD
    depth: int = _DEPTH
    heads: int = HEADS
    rms: bool = True

    kind = "ddt"
    rules = ((r"(^|/)project/kernel$", P(None, "fsdp")),)
    matrices = (
        (r"head_blocks/attention/qkv_kernel$", (1,), (3, 4)),
        (r"head_blocks/(attention/out|fc1|fc2|swiglu/out)/kernel$", (1,), (2,)),
        (r"head_blocks/swiglu/kernel$", (1,), (3,)),
    )
    fixed = (r"(^|/)time/frequencies$",)

    def __post_init__(self):
        if min(self.width, self.depth, self.heads) < 1 or self.width % (4 * self.heads):
            raise InputError(
                f"{self}: width, depth and heads must be at least 1, and the width a multiple of "
                "4 times the heads"
            )

    def check(self, model: ModelConfig) -> None:
        block = model.block
        fits = isinstance(block.mixer, RopeAttention) and isinstance(block.ffn, SwiGlu | Mlp)
        if not fits or block.wrap is not None or block.norm is not None:
            raise InputError(
                f"network {self.kind} is made of mixer rope and ffn swiglu or mlp, without wrap or "
                "norm, "
                f"and the model has {block.mixer}, {block}: set config.model.mixer=rope and "
                "config.model.ffn=swiglu"
            )
        told = [c.name for c in model.conditions if c.enters != "input"]
        if told or model.adapters:
            what = f"condition {told[0]}" if told else "adapters"
            raise InputError(f"network {self.kind} has no place for {what}: leave it out")
        for k, stage in enumerate(model.pyramid.stages):
            numbers = math.prod(stage.patch) * model.channels
            if self.width < numbers:
                patch = f"{stage.patch[1]}x{stage.patch[0]}"
                raise InputError(
                    f"{self}: the head is {self.width} wide, and tokens of stage {k} ({patch} "
                    f"patches of {model.channels} channels) have {numbers} numbers, of which it "
                    f"predicts no more than its width: give a width of {numbers} or more, or "
                    "smaller patches"
                )

    def stacks(self, model: ModelConfig) -> tuple[ModelConfig, ...]:
        own = dict(width=self.width, depth=self.depth, heads=self.heads)
        encoder = replace(model, network=None, conditions=())
        return encoder, replace(encoder, **own)

    def module(self, model: ModelConfig, **options: Any) -> WideHead:
        return WideHead(model, self, **options)

    def ends_flops(self, model: ModelConfig, stage: int) -> int:
        """Projections, and of the head's blocks 12 N h^2 of adaLN and what their parts count."""
        d, h, pixels = model.width, self.width, model.latent_size**2 * model.channels
        rows, cols = model.pyramid.grid(stage, model.latent_size)
        n, head = rows * cols, self.stacks(model)[1]
        parts = model.block.mixer.flops(head, stage, n) + model.block.ffn.flops(head, n)
        ends = 2 * pixels * (d + h * (3 if model.learn_sigma else 2)) + 2 * d * (2 * FOURIER + d)
        between = 2 * n * d * h if d != h else 0
        return ends + between + self.depth * (12 * n * h * h + parts) + 4 * n * h * h

    def keys(self, model: ModelConfig) -> Iterator[Key]:
        """Names of the original; of several stages those of PPFlow."""
        out = model.channels * (2 if model.learn_sigma else 1)
        for k, (suffix, factor) in enumerate(factors(model.pyramid)):
            into = factor | dict(c=model.channels)
            yield from patch_keys(f"s_embedder.proj{suffix}", ("patchify", k), into)
            yield from patch_keys(f"x_embedder.proj{suffix}", ("head_patchify", k), into)
            name = f"final_layer.linear{suffix}"
            yield from map(_negative, final_keys(name, ("unpatchify", k), factor | dict(o=out)))
        yield Key("t_embedder.W", ("time", "frequencies"))
        yield from linear_keys("t_embedder.mlp.0", "time", "fc1")
        yield from linear_keys("t_embedder.mlp.2", "time", "fc2")
        yield Key("y_embedder.embedding_table.weight", ("label", "embedding"))
        if model.has_levels:
            yield Key("level_embedder.embedding_table.weight", ("level", "embedding"))
        encoder, head = self.stacks(model)
        yield from self.block_keys(encoder, "blocks", 0)
        yield from self.block_keys(head, "head_blocks", encoder.depth)
        if encoder.width != head.width:
            yield from linear_keys("s_projector", "project")
        if self.rms:
            yield Key("final_layer.norm_final.weight", ("final_norm",))
        yield from linear_keys("final_layer.adaLN_modulation.1", "final_adaln")

    def block_keys(self, stack: ModelConfig, root: str, first: int) -> Iterator[Key]:
        """Of one stack, whose first block has the number `first` in the file."""
        for layer in range(stack.depth):
            name = f"blocks.{layer}"
            keys = [*attention_keys(layer, stack.heads), *stack.block.keys(layer)]
            keys += linear_keys(f"{name}.adaLN_modulation.1", "blocks", "adaln", index=(layer,))
            for norm in ("norm1", "norm2") if self.rms else ():
                keys.append(Key(f"{name}.{norm}.weight", ("blocks", norm), (layer,)))
            for key in keys:
                torch = f"blocks.{first + layer}{key.torch.removeprefix(name)}"
                yield key._replace(torch=torch, path=(root, *key.path[1:]))

    def tables(self, model: ModelConfig) -> dict[str, np.ndarray]:
        """Sin-cos positions of the encoder, and the cosines and sines of both stacks' turns."""
        found, stages = {}, range(len(model.pyramid))
        for k in stages:
            at = f".{k}" if len(stages) > 1 else ""
            place = positions(model.pyramid, k, model.latent_size, model.width)
            found[f"pos_embed{at}"] = place[None]
            grid, fine = (model.pyramid.grid(i, model.latent_size) for i in (k, len(stages) - 1))
            for name, stack in zip(("enc", "dec"), self.stacks(model)):
                w = np.repeat(angles(grid, fine, stack.head_width), 2, axis=-1)
                for text, f in (("cos", np.cos), ("sin", np.sin)):
                    found[f"{name}_feat_rope{at}.freqs_{text}"] = np.float32(f(w))
        return found

    def flow(self, model: ModelConfig) -> dict[str, Any]:
        numbers = math.prod(model.shape)
        return {"shift": shift_of(numbers)} if numbers >= BASE_NUMBERS else {}

    @classmethod
    def read(
        cls, state: Mapping[str, Any], model: dict[str, Any], said: Backbone | None
    ) -> DDT | None:
        """Widths and heads; the depth of the head where it is wider, else that of public models."""
        names = ("s_embedder.proj.weight", "x_embedder.proj.weight")
        if lacking(state, dict.fromkeys(names, 4)):
            return None
        encoder, head = (state[name].shape[0] for name in names)
        widths: list[int] = []
        while (name := f"blocks.{len(widths)}.attn.proj.weight") in state:
            widths.append(state[name].shape[0])
        depth = widths.count(head) if head != encoder else _DEPTH
        depth = said.depth if isinstance(said, DDT) else depth
        model |= {"width": encoder, "depth": len(widths) - depth}
        heads = {}
        for name, width in (("enc", encoder), ("dec", head)):
            tables = (f"{name}_feat_rope{at}.freqs_cos" for at in ("", ".0"))
            found = next((state[t] for t in tables if t in state), None)
            if found is not None:
                heads[name] = width // found.shape[-1]
        if "enc" in heads:
            model["heads"] = heads["enc"]
        if isinstance(said, DDT):
            return said
        if "dec" not in heads and head != HEAD:
            raise InputError(
                f"how many heads the wide head has is not in the file, and its width {head} is not "
                f"that of a public model: say it with --network=ddt:width={head},heads=N"
            )
        return cls(head, depth, heads.get("dec", HEADS), "final_layer.norm_final.weight" in state)


def _negative(key: Key) -> Key:
    """The original's velocity points from data to noise."""
    return key._replace(
        ours=lambda x: np.negative(key.ours(x)), theirs=lambda x: np.negative(key.theirs(x))
    )
