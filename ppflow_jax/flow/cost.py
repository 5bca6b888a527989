"""Floating-point operations by formula (XLA counts the body of a scan once)."""

from __future__ import annotations

from ppflow_jax.flow.plan import Segment
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import forward_flops


def segment_flops(model: ModelConfig, segment: Segment, weak: ModelConfig | None = None) -> int:
    """FLOPs of one image through a fixed-grid segment.

    A guided evaluation counts double, or with a weaker network one evaluation of each.
    """

    def evaluation(model: ModelConfig, stage: int, step: int) -> int:
        if (method := segment.method) is None:
            return forward_flops(model, stage)
        inputs = {name: table[step] for name, table in segment.inputs.items()}
        return method.flops(model, stage, segment.full[step], inputs)

    total = 0
    for step in range(segment.steps):
        for stage, guided in zip(segment.stages, segment.guided):
            total += evaluation(model, stage, step)
            if guided:
                total += evaluation(weak or model, stage, step)
    return total


def sampling_flops(
    model: ModelConfig, segments: tuple[Segment, ...], weak: ModelConfig | None = None
) -> int:
    """FLOPs of one image through a fixed-grid plan."""
    return sum(segment_flops(model, segment, weak) for segment in segments)


def training_flops(
    model: ModelConfig,
    pattern: tuple[int, ...],
    batch_size: int,
    evaluated: tuple[int, ...] = (),
) -> int:
    """FLOPs of one training step: forward, and backward twice that, without rematerialisation.

    A run that trains a part needs up to a third less: kernels that stay have no gradient.

    Args:
      pattern: stage of every sample of one period of the batch, see `flow.terms.Objective`.
      evaluated: stages of what is evaluated without gradient for these samples.
    """
    passes = (*pattern * 3, *evaluated)
    return batch_size * sum(forward_flops(model, stage) for stage in passes) // len(pattern)
