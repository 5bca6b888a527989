"""The plan of a model: that of its pyramid, and what the model was trained for."""

from __future__ import annotations

from dataclasses import replace

from ppflow_jax.errors import InputError
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig, Segment, plan
from ppflow_jax.flow.solvers import JUMPS
from ppflow_jax.models.conditions import GUIDANCE, INTERVAL, supplied
from ppflow_jax.models.config import ModelConfig


def segments_of(config: SamplerConfig, model: ModelConfig, flow: Flow) -> tuple[Segment, ...]:
    """Segments of a run of a model, see `flow.plan.plan`.

    A model that is told the guidance scale evaluates no null class.

    Raises:
      InputError: settings that do not fit the model.
    """
    told = supplied(model.conditions)
    if config.solver in JUMPS:
        if INTERVAL not in told:
            raise InputError(
                f"solver={config.solver} is for models trained with the objective of that name: "
                "choose another, such as heun"
            )
        if set(config.cfg) != {1.0}:
            raise InputError(
                f"solver={config.solver} has its guidance from training: leave cfg out, not "
                f"{','.join(f'{s:g}' for s in config.cfg)}"
            )
    segments = plan(config, model.pyramid, flow)
    if GUIDANCE not in told:
        return segments
    if config.cfg_channels:
        raise InputError(
            "the model is told the guidance scale, and guides the channels that its teacher did: "
            "leave cfg_channels out"
        )
    return tuple(replace(segment, embedded=True) for segment in segments)
