"""Hours from FLOPs, bytes and what is published about a chip: estimates, nothing is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from ppflow_jax.cost.chips import Chip
from ppflow_jax.cost.published import Reached
from ppflow_jax.data.cache import Manifest
from ppflow_jax.data.sources import open_source
from ppflow_jax.errors import InputError
from ppflow_jax.files.place import place
from ppflow_jax.flow.cost import sampling_flops, training_flops
from ppflow_jax.flow.plan import Segment
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import block_traffic

SAMPLES = 50_000  # of an FID
IMAGENET = 1_281_167  # examples of its training set
_STATE = 4  # arrays of a parameter's size in float32: itself, EMA, two moments


class Times(NamedTuple):
    """Seconds of one run of a program, each with less hope than the one before.

    Attributes:
      limits: of what is published about the chip, if all transfers hide behind work.
      best: at the most of its peak that a public training run reached, or with transfers that wait
        for the work, whichever takes longer.
      diffusion: the same for a public run of a diffusion transformer.
    """

    limits: float
    best: float
    diffusion: float

    @classmethod
    def of(cls, limits: dict[str, float], reached: Reached) -> Times:
        """`limits`: seconds of `compute` at peak, HBM (`memory`) and `links`."""
        compute, links = limits["compute"], limits["links"]
        work = max(compute, limits["memory"])
        slow = (max(compute / share.value, work + links) for share in reached)
        return cls(max(work, links), *slow)


@dataclass(frozen=True)
class Work:
    """One run of a program that is split over devices by images only, by formula.

    Attributes:
      images: over all devices.
      flops: over all devices.
      traffic: bytes to and from the HBM of a device.
      sent: bytes that a device sends.
    """

    images: int
    flops: int
    traffic: float
    sent: float = 0.0

    def limits(self, chip: Chip, shape: str, devices: int) -> dict[str, float]:
        """Seconds by each limit of `devices` that are a slice of such a shape, or so many GPUs."""
        return {
            "compute": self.flops / devices / chip.flops,
            "memory": self.traffic / chip.memory_rate,
            "links": self.sent / chip.sending_rate(shape),
        }


def training_work(
    model: ModelConfig, pattern: tuple[int, ...], parameters: int, batch: int, devices: int
) -> Work:
    """A training step in bfloat16 whose float32 state is on every device.

    Gradients are summed in bfloat16, as XLA compiles it for TPU.

    Args:
      pattern: stage of every sample of one period of the batch.
    """
    each = batch / devices / len(pattern)  # images of one entry
    activations = each * sum(block_traffic(model, stage) for stage in pattern)
    state = 2 * 4 * _STATE * parameters
    return Work(
        batch,
        training_flops(model, pattern, batch),
        state + 3 * 2 * (parameters + activations),
        2 * 2 * parameters * (devices - 1) / devices,
    )


def sampling_work(
    model: ModelConfig, segments: tuple[Segment, ...], parameters: int, batch: int, devices: int
) -> Work:
    """A sampler in bfloat16 whose weights are on every device, which then sends nothing."""
    traffic = 0.0
    for segment in segments:
        for stage, guided in zip(segment.stages, segment.guided):
            images = (1 + guided) * batch / devices
            traffic += segment.steps * 2 * (parameters + images * block_traffic(model, stage))
    return Work(batch, batch * sampling_flops(model, segments), traffic)


def training_bytes(
    config: ConfigDict, model: ModelConfig, weights: int, images: dict[int, float]
) -> int:
    """Bytes of a training step beside state and batch, on a device with `images` of every stage.

    Gradients like the float32 `weights` (bytes on the device), both again in the compute dtype, and
    what blocks keep for the gradient. For N tokens and width D these are 16 N D elements as
    Korthikanti et al. (arXiv 2205.05198, eq. 2) count them, without dropout, and without scores,
    since fused attention keeps none; 4 N D for the scales and gates of adaLN. With remat `dots` the
    10 N D that products give, and the block's input; with `full` that input alone. In these two
    cases one block is at work besides.
    """
    kept = {"none": 20, "dots": 11, "full": 1}[config.model.remat]
    again = 20 if kept < 20 else 0
    elements = 0.0
    for stack in model.stacks:
        tokens = sum(_tokens(stack, stage) * count for stage, count in images.items())
        inside = stack.width * (stack.depth * kept + again)
        elements += tokens / config.train.accumulate * inside
    return round(weights + _itemsize(config) * (elements + 2 * weights / 4))


def sampler_bytes(config: ConfigDict, model: ModelConfig, weights: int, images: float) -> int:
    """Bytes of a sampler beside float32 `weights`: these in the compute dtype, a block at work."""
    tokens = 2 * images * max(_tokens(model, stage) for stage in range(len(model.pyramid)))
    return round(_itemsize(config) * (weights / 4 + 20 * tokens * model.width))


def _tokens(model: ModelConfig, stage: int) -> int:
    rows, cols = model.pyramid.grid(stage, model.latent_size)
    return rows * cols


def _itemsize(config: ConfigDict) -> int:
    return jnp.dtype(config.model.dtype).itemsize


def examples(config: ConfigDict) -> tuple[int, str]:
    """Examples of the data, and whose they are; (0, why) where this machine cannot tell.

    Without data at hand a model of 1000 classes is given the number of ImageNet.
    """
    data = config.data
    try:
        if data.source == "cache" and data.path:
            return Manifest.read(place(data.path).absolute()).pictures, "the data"
        if data.source in ("digits", "arrays", "cache"):
            return len(open_source(data.source, data.path)), "the data"
        why = f"the pictures of {data.source} are counted by the run itself"
    except InputError as e:
        why = str(e)
    if config.model.num_classes == 1000:
        return IMAGENET, "ImageNet"
    return 0, why
