"""The parts, networks, conditions and tasks that configurations and checkpoints name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

from ppflow_jax.errors import InputError
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.flow.terms import Objective, Term
from ppflow_jax.flow.times import LogitNormal
from ppflow_jax.models.backbone import Backbone
from ppflow_jax.models.conditions import Channels, Condition, Scalar
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.norms import Norm
from ppflow_jax.models.parts import BlockSpec, Ffn, FullAttention, Mixer, Mlp, Part, Wrap
from ppflow_jax.pyramid import Pyramid
from ppflow_jax.systems.cascade import Upsampling
from ppflow_jax.systems.clear import Clear
from ppflow_jax.systems.ddt import DDT
from ppflow_jax.systems.ddt_blocks import RopeAttention, SwiGlu
from ppflow_jax.systems.dense2moe import Dense2MoE
from ppflow_jax.systems.dense2moe_distillation import SlicesDistil
from ppflow_jax.systems.dico import DiCo
from ppflow_jax.systems.dico_network import DiCoNetwork
from ppflow_jax.systems.dimr import MultiResolution, TdLn
from ppflow_jax.systems.dydit import DyDiT
from ppflow_jax.systems.dydit_training import FlopsTarget
from ppflow_jax.systems.guided_distillation import Guided, Halved
from ppflow_jax.systems.haste import AttentionAlign
from ppflow_jax.systems.linfusion import LinFusion
from ppflow_jax.systems.meanflow import MeanFlow
from ppflow_jax.systems.mixer_distillation import Distil
from ppflow_jax.systems.mixture_of_blocks import MixtureOfBlocks
from ppflow_jax.systems.mmd import Mmd
from ppflow_jax.systems.moe import MoE
from ppflow_jax.systems.ppcl import Ppcl
from ppflow_jax.systems.repa import Repa
from ppflow_jax.systems.self_conditioning import SelfCondition
from ppflow_jax.systems.switch import Switch
from ppflow_jax.systems.tasks import Colourisation, Edges, Inpainting, SuperResolution, Task

# A state dict has the first one that finds its names there
FFNS: dict[str, type[Ffn]] = {part.kind: part for part in (Dense2MoE, Mlp, MoE, SwiGlu)}
WRAPS: dict[str, type[Wrap]] = {part.kind: part for part in (Switch, DyDiT, MixtureOfBlocks)}
NORMS: dict[str, type[Norm]] = {part.kind: part for part in (TdLn,)}
# The last one is what a state dict has that is none of the others
MIXERS: dict[str, type[Mixer]] = {
    part.kind: part for part in (Clear, LinFusion, DiCo, RopeAttention, FullAttention)
}
# By the field of `BlockSpec`
KINDS: dict[str, dict[str, Any]] = {"ffn": FFNS, "wrap": WRAPS, "mixer": MIXERS, "norm": NORMS}
NETWORKS: dict[str, type[Backbone]] = {network.kind: network for network in (DDT, DiCoNetwork)}
TERMS: dict[str, Any] = {
    term.name: term for term in (Repa, AttentionAlign, MultiResolution)
}  # of the loss
OBJECTIVES = {
    kind.kind: kind
    for kind in (MeanFlow, Guided, Halved, Distil, SlicesDistil, Mmd, FlopsTarget, Ppcl)
}
UNIFORM = "uniform"  # raw times of training, where they are nothing else
FLOW = "flow"  # the objective without further settings
NONE = "none"  # of a part that there need not be
TASKS: dict[str, type[Task]] = {
    task.kind: task for task in (SuperResolution, Inpainting, Colourisation, Edges, Upsampling)
}
CONDITIONS: dict[str, type[Condition]] = {c.kind: c for c in (Channels, Scalar, SelfCondition)}

_READERS = {
    "int": int,
    "str": str,
    "float": float,
    "bool": {"true": True, "false": False}.__getitem__,
    "tuple[int, ...]": lambda text: tuple(map(int, text.split("/"))),
    "tuple[str, ...]": lambda text: tuple(text.split("/")),
}


def part(text: str, field: str) -> Part:
    """The part that `kind:key=value,...` names, for a field of `BlockSpec`.

    Raises:
      InputError: an unknown kind or key, a value that cannot be read or is out of its range.
    """
    return _made(text, field, KINDS[field])


def condition(text: str) -> Condition:
    """The condition that `kind:name=...,key=value,...` names.

    Raises:
      InputError: see `part`; no name.
    """
    return _made(text, "condition", CONDITIONS)


def task(text: str) -> Task | None:
    """The task that `kind:key=value,...` names; `none` is none.

    Raises:
      InputError: see `part`.
    """
    return None if text == NONE else _made(text, "task", TASKS)


def term(text: str) -> Term:
    """The term of the loss that `kind:key=value,...` names.

    Raises:
      InputError: see `part`.
    """
    return _made(text, "term", TERMS)


def objective(text: str, base: FlowObjective, model: ModelConfig) -> Objective:
    """What is minimised, by `kind:key=value,...`: `flow` is `base`, others are made on it.

    Raises:
      InputError: see `part`; an objective that does not fit the model.
    """
    settings = None if text == FLOW else _made(text, "objective", OBJECTIVES)
    if isinstance(model.block.wrap, DyDiT) and not isinstance(settings, FlopsTarget):
        raise InputError(
            f"objective {text} does not train the routers of config.model.wrap=dydit: set "
            "config.flow.objective=dydit:share=0.5,warmup=1000"
        )
    if settings is None:
        return base
    if model.network is not None and not model.has_trunk:
        raise InputError(
            f"objective {settings.kind} is for the transformer, not for {model.network.kind}: "
            "leave config.flow.objective=flow"
        )
    plain = Distil | SlicesDistil | FlopsTarget | Ppcl  # of any path
    if not base.law.plain and not isinstance(settings, plain):
        raise InputError(
            f"objective {settings.kind} has times of its own: leave config.flow.shift=1 and "
            "config.flow.times=uniform"
        )
    return settings.on(base, model)


def times(text: str) -> LogitNormal | None:
    """How training draws raw times: `uniform`, or `logit_normal:mean=0,std=1`.

    Raises:
      InputError: see `part`.
    """
    return None if text == UNIFORM else _made(text, "times", {LogitNormal.kind: LogitNormal})


def notes_of(text: str, config: SamplerConfig) -> tuple[str, ...]:
    """What a person should know of sampling so what was trained with the objective `text`.

    Raises:
      InputError: it cannot be sampled so.
    """
    return () if text == FLOW else _made(text, "objective", OBJECTIVES).notes(config)


def _made(text: str, field: str, kinds: Mapping[str, Any]) -> Any:
    kind, _, settings = text.partition(":")
    if kind not in kinds:
        known = ", ".join(kinds)
        raise InputError(f"unknown {field} {kind!r}: one of {known}")
    types, values = {f.name: f.type for f in fields(kinds[kind])}, {}
    for pair in filter(None, settings.split(",")):
        key, _, value = pair.partition("=")
        if key not in types:
            raise InputError(
                f"{field} {text!r}: unknown key {key!r}, {kind} has {', '.join(types) or 'none'}"
            )
        try:
            values[key] = _READERS[types[key]](value)
        except (ValueError, KeyError) as e:
            raise InputError(f"{field} {text!r}: {key} is {types[key]}, got {value!r}") from e
    if lacks := [
        f.name for f in fields(kinds[kind]) if f.default is MISSING and f.name not in values
    ]:
        raise InputError(f"{field} {text!r} has no {lacks[0]}: write {kind}:{lacks[0]}=...")
    return kinds[kind](**values)


def canonical(text: str, field: str) -> str:
    """The text of a part or of a network with all its settings."""
    kinds = NETWORKS if field == "network" else KINDS[field]
    return text if text == NONE else str(_made(text, field, kinds))


def take_conditions(values: dict[str, Any]) -> tuple[Condition, ...]:
    """The conditions among the settings of a model, which are taken out of `values`.

    Raises:
      InputError: see `condition`; no list of texts.
    """
    texts = values.pop("conditions", ())
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InputError(
            f"config.model.conditions={texts!r}: give a tuple of texts such as "
            "('channels:name=low,channels=4',)"
        )
    return tuple(map(condition, texts))


def take_block(values: dict[str, Any]) -> BlockSpec:
    """The parts among the settings of a model, which are taken out of `values`.

    Raises:
      InputError: see `part`.
    """
    texts = {field: values.pop(field) for field in KINDS if field in values}
    return BlockSpec(**{f: part(text, f) for f, text in texts.items() if text != NONE})


def take_network(values: dict[str, Any]) -> Backbone | None:
    """The network among the settings of a model, which is taken out of `values`; None: PPFlow's.

    Raises:
      InputError: see `part`.
    """
    text = values.pop("network", NONE)
    return None if text == NONE else _made(text, "network", NETWORKS)


def read_network(
    state: Mapping[str, Any], model: dict[str, Any], said: str | None = None
) -> Backbone | None:
    """The network of a PyTorch state dict, `said` as a configuration has it; None: PPFlow's.

    Args:
      model: is given the fields of `ModelConfig` that the network knows.

    Raises:
      InputError: see `part`, `Backbone.read`.
    """
    given = take_network({"network": said}) if said else None
    found = (kind.read(state, model, given) for kind in NETWORKS.values())
    return next(filter(None, found), None)


def read_conditions(state: Mapping[str, Any], pyramid: Pyramid) -> tuple[Condition, ...]:
    """The conditions of a PyTorch state dict; what names and shapes do not say is the default.

    Raises:
      InputError: see `Condition.read`.
    """
    names = dict.fromkeys(name.split(".")[1] for name in state if name.startswith("conditions."))
    found = []
    for name in names:
        kinds = (kind.read(state, name, pyramid) for kind in CONDITIONS.values())
        if (made := next(filter(None, kinds), None)) is None:
            raise InputError(f"conditions.{name} is no condition that is known: update ppflow_jax")
        found.append(made)
    return tuple(found)


def read_block(
    state: Mapping[str, Any], width: int, said: str | None = None, mixer: str | None = None
) -> tuple[BlockSpec, int]:
    """The parts of a PyTorch state dict, and the hidden units of its MLP or of an expert.

    `said` is the part after attention as a configuration has it, which says what names and shapes
    do not; `mixer` that in place of attention.

    Raises:
      InputError: it has none that is known.
    """
    found = [ffn for kind in FFNS.values() if (ffn := kind.read(state, width))]
    if not found:
        raise InputError(
            "the architecture cannot be read from this file: it has neither "
            "blocks.0.mlp.fc1.weight nor experts in blocks.0.moe"
        )
    ffn, hidden = found[0]
    wrap = next(filter(None, (kind.read(state) for kind in WRAPS.values())), None)
    mixed = next(filter(None, (kind.read(state) for kind in MIXERS.values())))
    texts = {"ffn": said or str(ffn), "mixer": mixer or str(mixed)}
    norm = next(filter(None, (kind.read(state) for kind in NORMS.values())), None)
    return replace(take_block(texts), wrap=wrap, norm=norm), hidden
