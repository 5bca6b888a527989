"""Sampling with another number of experts than was trained, in every stage its own.

How many experts a token passes is in no weight: Dense2MoE (arXiv 2510.09094) takes fewer where less
will do, down to its shared slice alone, and a mixture of DiT-MoE takes fewer too. Here the number
belongs to a stage of the pyramid: coarse stages, where little is decided yet, may take fewer than
fine ones. It is static, and its FLOPs are in the plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Array

from ppflow_jax.errors import InputError
from ppflow_jax.flow.method import Evaluation
from ppflow_jax.flow.plan import Segment
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.parts import BlockSpec
from ppflow_jax.systems.composition import Made, in_stages
from ppflow_jax.systems.dense2moe import Dense2MoE
from ppflow_jax.systems.moe import MoE


@dataclass(frozen=True)
class ExpertsConfig:
    """How many experts a token passes.

    Attributes:
      experts: one number, or one for every stage, coarse to fine.
    """

    experts: tuple[int, ...]


@dataclass(frozen=True)
class OtherExperts:
    """The method of a segment (see `flow.method.Method`); it remembers nothing.

    Attributes:
      top_k: experts that a token passes.
    """

    top_k: int
    level: str = "network"

    @property
    def name(self) -> str:
        return f"{self.top_k} experts"

    def memory(self, evaluation: Evaluation) -> tuple[()]:
        return ()

    def evaluate(self, evaluation: Evaluation, memory: tuple[()]) -> tuple[Array, tuple[()]]:
        return evaluation.call(parts=self.parts), memory

    def parts(self, block: BlockSpec) -> BlockSpec:
        """The block with so many experts; one without any, as of a weaker network, as it is.

        Raises:
          InputError: there are not so many.
        """
        if not isinstance(block.ffn, MoE | Dense2MoE):
            return block
        return replace(block, ffn=replace(block.ffn, top_k=self.top_k))

    def flops(self, model: ModelConfig, stage: int, full: bool, inputs: Any) -> int:
        return forward_flops(replace(model, block=self.parts(model.block)), stage)


def with_experts(
    segments: Iterable[Segment], model: ModelConfig, config: ExpertsConfig
) -> list[Segment]:
    """The plan with the numbers of `config`.

    Raises:
      InputError: blocks without experts, fewer or more numbers than stages, numbers that there are
        not, or a stage that has another method.
    """
    ffn, levels = model.block.ffn, len(model.pyramid)
    if not isinstance(ffn, MoE | Dense2MoE):
        raise InputError(f"experts is for blocks with experts, and the model has {ffn}")
    if len(config.experts) not in (1, levels):
        raise InputError(
            f"experts has {len(config.experts)} numbers: give one, or one for each of the {levels} "
            "stages"
        )
    numbers = np.resize(config.experts, levels).tolist()
    for number in numbers:
        replace(ffn, top_k=number)  # refuses what there is not

    def make(stage: int, steps: int) -> Made:
        if numbers[stage] == ffn.top_k:
            return None
        return OtherExperts(numbers[stage]), np.zeros(steps, bool), {}

    return in_stages(segments, model, "experts", tuple(range(levels)), make)
