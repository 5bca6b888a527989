"""What a sampling plan does and what it should cost, as text."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from ppflow_jax.console import table
from ppflow_jax.flow.cost import sampling_flops, segment_flops
from ppflow_jax.flow.plan import Segment
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.network import abstract_params
from ppflow_jax.pyramid import Pyramid, Stage


def explain(
    sampler: Sampler, model: ModelConfig, batch: int, weak: ModelConfig | None = None
) -> str:
    """A row for every segment, the predicted speed-up over SiT, and the memory of the methods.

    FLOPs are of one image. The speed-up is by FLOPs, against a SiT of the finest patch that takes
    the same steps, guided everywhere if anything here is. An adaptive plan has no fixed cost.

    Args:
      batch: images sampled at once, for the memory.
      weak: of autoguidance.
    """
    segments = sampler.segments
    cheap = sorted({s.method.name for s in segments if s.method is not None})
    head = ["t", "patch", "tokens", "full", *cheap, "guidance", "GFLOPs", "share"]
    adaptive = any(s.kind == "adaptive" for s in segments)
    total = sampling_flops(model, segments, weak)
    rows = []
    for s in segments:
        fulls = s.steps if s.method is None else sum(s.full)
        saved = {s.method.name: str((s.steps - fulls) * len(s.stages))} if s.method else {}
        cost = segment_flops(model, s, weak)
        rows.append(
            [
                f"{s.times[0]:.3f}-{s.times[-1]:.3f}",
                _each(model.pyramid.stages[i].patch[::-1] for i in s.stages),
                "+".join(str(t) for t in dict.fromkeys(_tokens(model, i) for i in s.stages)),
                "adaptive" if adaptive else str(fulls * len(s.stages)),
                *(saved.get(name, "0") for name in cheap),
                _guidance(s, weak is not None),
                "-" if adaptive else f"{cost / 1e9:.4g}",
                "-" if adaptive else f"{cost / total:.1%}",
            ]
        )
    lines = [table([head, *rows], left=())]
    if not adaptive:
        sit = _sit_flops(model, segments)
        lines.append(
            f"{total / 1e9:.4g} GFLOPs an image, {total / sit:.1%} of SiT with the same steps"
            f"{', guided everywhere' if _guided(segments) else ''}: "
            f"{sit / total:.2f}x faster by FLOPs"
        )
    memory = memory_bytes(sampler, model, batch, weak)
    lines.append(f"buffers: {memory / 2**20:.4g} MiB at their peak for a batch of {batch}")
    return "\n".join(lines)


def memory_bytes(
    sampler: Sampler, model: ModelConfig, batch: int, weak: ModelConfig | None = None
) -> int:
    """Largest memory that the methods of a plan hold at once, over all devices."""
    shapes = (
        abstract_params(model),
        None if weak is None else abstract_params(weak),
        jax.ShapeDtypeStruct((batch, *model.shape), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    sizes = [
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(memory))
        for memory in (sampler.memory_of(s, *shapes) for s in sampler.segments)
    ]
    return max(sizes, default=0)


def _sit_flops(model: ModelConfig, segments: tuple[Segment, ...]) -> int:
    """The same evaluations by the pyramid of one stage."""
    patch = min((s.patch for s in model.pyramid.stages), key=lambda p: p[0] * p[1])
    sit = replace(model, pyramid=Pyramid((Stage(1.0, patch),)), students=())
    count = sum(s.steps * len(s.stages) for s in segments)
    return count * forward_flops(sit, 0) * (2 if _guided(segments) else 1)


def _guided(segments: tuple[Segment, ...]) -> bool:
    """Whether anything is, by two evaluations or by one that is told the scale."""
    return any(scale != 1 for s in segments for scale in s.scales)


def _tokens(model: ModelConfig, stage: int) -> int:
    rows, cols = model.pyramid.grid(stage, model.latent_size)
    return rows * cols


def _each(patches) -> str:
    return "+".join(dict.fromkeys(f"{w}x{h}" for w, h in patches))


def _guidance(segment: Segment, weak: bool) -> str:
    scales = "+".join(dict.fromkeys(f"{s:g}" for s in segment.scales if s != 1))
    kind = "weak " if weak else "embedded " if segment.embedded else ""
    return f"{kind}{scales}" if scales else "none"
