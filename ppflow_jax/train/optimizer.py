"""The optimizer and its learning rate schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ppflow_jax.devices.sharding import leaf_path
from ppflow_jax.errors import InputError
from ppflow_jax.models.parts import Matrix

MUON = "muon"  # also in the names of its operations
NAMES = ("adamw", MUON)
SCHEDULES = ("constant", "cosine", "wsd", "wsd_sqrt")
DECAYING = ("wsd", "wsd_sqrt")
# Of DiT's blocks: queries, keys and values are a matrix each. Other parts bring their own. Their
# other axes (depth, experts) count matrices.
MATRICES: tuple[Matrix, ...] = (
    (r"blocks/attention/qkv_kernel$", (1,), (3, 4)),
    (r"blocks/(attention/out|fc1|fc2)/kernel$", (1,), (2,)),
)
RMS = 0.2  # of Muon's steps, in learning rates: that of AdamW's (arXiv 2502.16982, section 2.2)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with the defaults of SiT and PPFlow, or Muon for the matrices of the blocks.

    Attributes:
      name: `adamw` or `muon`, see `make_optimizer`.
      lr: peak learning rate.
      schedule: `constant`, `cosine` to zero at the last step, or `wsd`: constant, then linearly to
        zero; `wsd_sqrt`: by 1 - sqrt of the share of the decay that is done.
      decay_share: share of all steps, at the end, in which wsd decays.
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
    name: str = "adamw"
    decay_share: float = 0.2

    def __post_init__(self):
        if self.name not in NAMES:
            raise InputError(f"unknown optimizer {self.name!r}: one of {', '.join(NAMES)}")
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
                ("decay_share", self.decay_share, 0 < self.decay_share <= 1, "in (0, 1]"),
            )
            if not good
        ]
        if wrong:
            raise InputError(f"config.optim: {', '.join(wrong)}")


def decay_start(steps: int, share: float) -> int:
    """The step after which wsd decays, so that it does in `share` of all, and in one at least."""
    return steps - max(1, round(share * steps))


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of every step, counted from 0.

    wsd is that of MiniCPM (arXiv 2404.06395), its decay by 1 - sqrt of arXiv 2405.18392.

    Raises:
      InputError: warm-up and decay take more than all steps.
    """
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(config.lr, max(1, steps - config.warmup_steps))
    elif config.schedule in DECAYING:
        main = _stable_then_decaying(config, steps)
    else:
        main = optax.constant_schedule(config.lr)
    if not config.warmup_steps:
        return main
    warmup = optax.linear_schedule(0.0, config.lr, config.warmup_steps)
    return optax.join_schedules([warmup, main], [config.warmup_steps])


def _stable_then_decaying(config: OptimConfig, steps: int) -> optax.Schedule:
    """From the end of the warm-up on."""
    start, first = decay_start(steps, config.decay_share), config.warmup_steps
    if start < first:
        raise InputError(
            f"config.optim: {first} warmup_steps and a decay of {steps - start} do not fit "
            f"{steps} steps: lower warmup_steps or decay_share"
        )

    def rate(count: Any) -> jax.Array:
        done = jnp.clip((count + first - start) / (steps - start), 0, 1)
        return config.lr * (1 - (jnp.sqrt(done) if config.schedule == "wsd_sqrt" else done))

    return rate


def make_optimizer(
    config: OptimConfig,
    steps: int,
    matrices: Sequence[Matrix] = (),
    undecayed: Sequence[str] = (),
) -> optax.GradientTransformation:
    """The optimizer, after gradient clipping if asked.

    AdamW (arXiv 1711.05101); or Muon for `MATRICES` and `matrices`, those of the model's own parts,
    and AdamW for all else: embeddings, (un)patchify, biases, adaLN, routers, adapters and leaves of
    terms. Muon's steps have the RMS of AdamW's (arXiv 2502.16982), so both have one learning rate
    and one weight decay; momentum is 0.95, Nesterov's, with 5 iterations of Newton and Schulz.
    Leaves of the patterns `undecayed` have no weight decay; Muon has none of them.
    """
    rate = learning_rate(config, steps)
    main = optax.adamw(
        rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=(lambda params: _decayed(params, undecayed)) if undecayed else None,
    )
    if config.name == MUON:
        main = _muon(config, rate, main, matrices)
    return optax.chain(optax.clip_by_global_norm(config.clip), main) if config.clip else main


def _decayed(params: Any, undecayed: Sequence[str]) -> Any:
    """The tree of `params` with whether weight decay is for a leaf."""

    def one(path, leaf) -> bool:
        return not any(re.match(pattern, leaf_path(path)) for pattern in undecayed)

    return jax.tree_util.tree_map_with_path(one, params)


def _muon(
    config: OptimConfig,
    rate: optax.Schedule,
    others: optax.GradientTransformation,
    matrices: Sequence[Matrix],
) -> optax.GradientTransformation:
    """Muon for the matrices, and `others` for the leaves that are none.

    Optax's `muon` would take these too, but with a Nesterov momentum that AdamW does not have.
    """
    axes = lambda params: muon_axes(params, matrices)
    muon = optax.contrib.muon(
        rate,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=axes,
        consistent_rms=RMS,
    )
    muon = muon._replace(update=jax.named_scope(MUON)(muon.update))

    def names(params: Any) -> Any:
        taken = lambda axes, _: "others" if axes is None else MUON
        return jax.tree.map(taken, axes(params), params, is_leaf=_is_axes)

    return optax.partition({MUON: muon, "others": others}, names)


def _is_axes(value: Any) -> bool:
    return value is None or isinstance(value, optax.contrib.MuonDimensionNumbers)


def muon_axes(params: Any, matrices: Sequence[Matrix] = ()) -> Any:
    """The tree of `params` with the axes of the matrices that Muon takes, None for other leaves."""

    def one(path, leaf) -> optax.contrib.MuonDimensionNumbers | None:
        name = leaf_path(path)
        for pattern, inputs, outputs in (*MATRICES, *matrices):
            if re.match(pattern, name):
                return optax.contrib.MuonDimensionNumbers(inputs, outputs)
        return None

    return jax.tree_util.tree_map_with_path(one, params)
