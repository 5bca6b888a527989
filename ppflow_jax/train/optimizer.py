"""The optimizer and its learning rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import optax

from ppflow_jax.errors import InputError

SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW; the defaults are those of SiT and PPFlow.

    Attributes:
      lr: peak learning rate.
      schedule: `constant`, or `cosine` to zero at the last step.
      warmup_steps: linear warm-up from zero.
      clip: global norm of the gradient that is not exceeded; 0 does not clip.

    Raises:
      InputError: a value out of its range.
    """

    lr: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 0.0

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise InputError(f"unknown schedule {self.schedule!r}: one of {', '.join(SCHEDULES)}")
        # written so that NaN fails too
        wrong = [
            f"{name} {value} (expected {text})"
            for name, value, good, text in (
                ("lr", self.lr, 0 < self.lr < math.inf, "> 0"),
                ("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, ">= 0"),
                ("b1", self.b1, 0 <= self.b1 < 1, "in [0, 1)"),
                ("b2", self.b2, 0 <= self.b2 < 1, "in [0, 1)"),
                ("eps", self.eps, 0 < self.eps < math.inf, "> 0"),
                ("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, ">= 0"),
                ("clip", self.clip, 0 <= self.clip < math.inf, ">= 0"),
            )
            if not good
        ]
        if wrong:
            raise InputError(f"config.optim: {', '.join(wrong)}")


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of every step, counted from 0."""
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(config.lr, max(1, steps - config.warmup_steps))
    else:
        main = optax.constant_schedule(config.lr)
    if not config.warmup_steps:
        return main
    warmup = optax.linear_schedule(0.0, config.lr, config.warmup_steps)
    return optax.join_schedules([warmup, main], [config.warmup_steps])


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101), after gradient clipping if asked."""
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw) if config.clip else adamw
