"""The parts that configurations and checkpoints name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ppflow_jax.errors import InputError
from ppflow_jax.flow.terms import Term
from ppflow_jax.models.parts import BlockSpec, Ffn, Mlp, Part, Wrap
from ppflow_jax.systems.moe import MoE
from ppflow_jax.systems.switch import Switch

FFNS: dict[str, type[Ffn]] = {part.kind: part for part in (Mlp, MoE)}
WRAPS: dict[str, type[Wrap]] = {part.kind: part for part in (Switch,)}
KINDS: dict[str, dict[str, Any]] = {"ffn": FFNS, "wrap": WRAPS}  # by the field of `BlockSpec`
TERMS: dict[str, Any] = {}  # of the loss
NONE = "none"  # of a part that there need not be

_READERS = {
    "int": int,
    "str": str,
    "float": float,
    "bool": {"true": True, "false": False}.__getitem__,
}


def part(text: str, field: str) -> Part:
    """The part that `kind:key=value,...` names, for a field of `BlockSpec`.

    Raises:
      InputError: an unknown kind or key, a value that cannot be read or is out of its range.
    """
    return _made(text, field, KINDS[field])


def term(text: str) -> Term:
    """The term of the loss that `kind:key=value,...` names.

    Raises:
      InputError: see `part`.
    """
    return _made(text, "term", TERMS)


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
    return kinds[kind](**values)


def canonical(text: str, field: str) -> str:
    """The text of a part with all its settings."""
    return text if text == NONE else str(part(text, field))


def take_block(values: dict[str, Any]) -> BlockSpec:
    """The parts among the settings of a model, which are taken out of `values`.

    Raises:
      InputError: see `part`.
    """
    texts = {field: values.pop(field) for field in KINDS if field in values}
    return BlockSpec(**{f: part(text, f) for f, text in texts.items() if text != NONE})


def read_block(
    state: Mapping[str, Any], width: int, said: str | None = None
) -> tuple[BlockSpec, int]:
    """The parts of a PyTorch state dict, and the hidden units of its MLP or of an expert.

    `said` is the part after attention as a configuration has it, which says what names and shapes
    do not.

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
    return replace(take_block({"ffn": said or str(ffn)}), wrap=wrap), hidden
