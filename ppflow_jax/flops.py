"""Floating-point operations by formula (XLA counts the body of a scan once)."""

from __future__ import annotations

from ppflow_jax.flow.plan import Segment
from ppflow_jax.models.layers import FREQUENCIES
from ppflow_jax.models.ppflow import ModelConfig


def forward_flops(model: ModelConfig, stage: int) -> int:
    """FLOPs of the matrix products of one evaluation of one image, 2 per multiply-add.

    Per block: 8 N D^2 (attention projections) + 4 N^2 D (attention) + 4 r N D^2 (MLP of ratio r)
    + 12 D^2 (adaLN); besides patch, final and time projections.
    """
    rows, cols = model.pyramid.grid(stage, model.latent_size)
    n, d = rows * cols, model.width
    hidden = int(model.mlp_ratio * d)
    block = 8 * n * d * d + 4 * n * n * d + 4 * n * d * hidden + 12 * d * d
    pixels = model.latent_size**2 * model.channels
    ends = 2 * d * pixels * (3 if model.learn_sigma else 2) + 4 * d * d
    return model.depth * block + ends + 2 * d * (2 * FREQUENCIES + d)


def sampling_flops(model: ModelConfig, segments: tuple[Segment, ...]) -> int:
    """FLOPs of one image through a fixed-grid plan; a guided evaluation counts double."""
    return sum(
        segment.steps * forward_flops(model, stage) * (2 if guided else 1)
        for segment in segments
        for stage, guided in zip(segment.stages, segment.guided)
    )


def training_flops(model: ModelConfig, pattern: tuple[int, ...], batch_size: int) -> int:
    """FLOPs of one training step: forward, and backward twice that, without rematerialisation.

    `pattern` is the stage of every sample of one period of the batch (`Objective.pattern`).
    """
    return 3 * batch_size * sum(forward_flops(model, stage) for stage in pattern) // len(pattern)


def block_traffic(model: ModelConfig, stage: int) -> int:
    """Elements that the matrix products and the softmax of all blocks read and write, one image.

    Per block: (12 + 2 r) N D + 4 h N^2 with h heads; an estimate of what crosses HBM if each
    product is one kernel. Weights are not counted.
    """
    rows, cols = model.pyramid.grid(stage, model.latent_size)
    n, d = rows * cols, model.width
    return model.depth * (int((12 + 2 * model.mlp_ratio) * n * d) + 4 * model.heads * n * n)
