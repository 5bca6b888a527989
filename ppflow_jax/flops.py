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
