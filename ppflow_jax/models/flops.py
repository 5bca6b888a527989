"""Floating-point operations of a network by formula (XLA counts the body of a scan once)."""

from __future__ import annotations

from ppflow_jax.models.adapters import low_rank_flops
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import FREQUENCIES
from ppflow_jax.models.student_blocks import Residual
from ppflow_jax.models.students import steps


def block_flops(
    model: ModelConfig, stage: int, attention: int | None = None, mlp: int | None = None
) -> int:
    """FLOPs of the matrix products of one block for one image, 2 per multiply-add.

    12 D^2 (adaLN, if it is the norm) + what the block's parts and adapters count; `attention` and
    `mlp` tokens enter those branches, all where not given.
    """
    rows, cols = model.pyramid.grid(stage, model.latent_size)
    block = model.block
    n = rows * cols if attention is None else attention
    m = rows * cols if mlp is None else mlp
    parts = block.mixer.flops(model, stage, n) + block.ffn.flops(model, m)
    parts += 0 if block.wrap is None else block.wrap.flops(model, m)
    adapters, _ = low_rank_flops(model, stage, n, m)
    norm = 12 * model.width**2 if block.norm is None else 0
    return norm + parts + adapters


def ends_flops(model: ModelConfig, stage: int) -> int:
    """FLOPs of what is not in the trunk's blocks, of one image.

    These are the patch, final and time projections, what conditions count, and adapters of these;
    of another network what it says.
    """
    d, pixels = model.width, model.latent_size**2 * model.channels
    if model.network is None:
        ends = 2 * d * pixels * (3 if model.learn_sigma else 2) + 4 * d * d
        ends += 2 * d * (2 * FREQUENCIES + d)
    else:
        ends = model.network.ends_flops(model, stage)
    told = sum(condition.flops(model) for condition in model.conditions)
    rows, cols = model.pyramid.grid(stage, model.latent_size)
    _, adapters = low_rank_flops(model, stage, rows * cols, rows * cols)
    return ends + told + adapters


def forward_flops(model: ModelConfig, stage: int) -> int:
    """FLOPs of one plain evaluation of one image."""
    rows, cols = model.pyramid.grid(stage, model.latent_size)
    stacks = (model,) if model.has_trunk else model.stacks
    blocks = sum(stack.blocks_at(stage) * block_flops(stack, stage) for stack in stacks)
    ffns = sum(step.residual is not None for step in steps(model, stage))
    less = model.block.ffn.flops(model, rows * cols) - Residual().flops(model, rows * cols)
    blocks -= ffns * less
    return blocks + ends_flops(model, stage)


def block_traffic(model: ModelConfig, stage: int) -> int:
    """Elements that the matrix products and the softmax of all blocks read and write, one image.

    Per block: 12 N D + 2 N u + 4 h S for h heads, u hidden units that a token passes, S elements of
    a head's softmax, N^2 in full attention; an estimate of what crosses HBM if each product is
    one kernel. Weights are not counted.
    """
    elements = 0
    for stack in model.stacks:
        rows, cols = stack.pyramid.grid(stage, stack.latent_size)
        n = rows * cols
        hidden = stack.block.ffn.hidden(stack)
        scores = stack.block.mixer.scores(stack, stage)
        inside = int((12 * stack.width + 2 * hidden) * n) + 4 * stack.heads * scores
        elements += stack.blocks_at(stage) * inside
    return elements
