"""Requests as JSON, a line of a file or the body of a message, checked at the door."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ppflow_jax.api.model import Model
from ppflow_jax.errors import SEEDS, InputError
from ppflow_jax.files.place import place

MOST_GUIDANCE = 100.0
_SHOWN = 60  # characters of a wrong value that an error repeats


class Line(NamedTuple):
    """Image 0 of a seed.

    Attributes:
      label: class; the number of classes itself is none.
      guidance: scale of every stage; None is that of the command.
    """

    label: int
    seed: int
    guidance: tuple[float, ...] | None


@dataclass(frozen=True)
class Lines:
    """The pictures that a file asks for, one a line.

    Attributes:
      sha256: of the file.
    """

    lines: tuple[Line, ...]
    sha256: str

    @property
    def labels(self) -> np.ndarray:
        """int32 [n]."""
        return np.array([line.label for line in self.lines], np.int32)

    @property
    def seeds(self) -> np.ndarray:
        """uint32 [n]."""
        return np.array([line.seed for line in self.lines], np.uint32)


def read_lines(path: str | Path, model: Model) -> Lines:
    """A file with an object such as {"label": 3, "seed": 7, "guidance": [1, 3]} on every line.

    `label` is a class by number or name, `seed` is 0 and `guidance` that of the command where they
    are left out. Blank lines are skipped.

    Raises:
      InputError: a file that cannot be read or holds no request; the first line that is wrong.
    """
    try:
        data = place(path).read_bytes()
    except OSError as e:
        raise InputError(f"cannot read --requests={path} ({e.strerror}): give a file") from e
    lines = []
    for number, body in enumerate(data.split(b"\n"), start=1):
        if not body.strip():
            continue
        try:
            lines.append(_line(body, model))
        except InputError as e:
            raise InputError(f"{path}, line {number}: {e}") from e
    if not lines:
        raise InputError(
            f'{path} holds no request: write lines such as {{"label": 0, "seed": 1, "guidance": 3}}'
        )
    return Lines(tuple(lines), hashlib.sha256(data).hexdigest())


def _line(body: bytes, model: Model) -> Line:
    given = parse_object(body, ("label", "seed", "guidance"))
    stages = len(model.config.pyramid)
    return Line(
        label_of(given, model),
        whole_of("seed", given.get("seed", 0), 0, SEEDS - 1),
        guidance_of(given["guidance"], stages) if "guidance" in given else None,
    )


def parse_object(body: bytes, known: tuple[str, ...]) -> dict[str, Any]:
    """The object of a JSON text.

    Raises:
      InputError: something else, or a field that is not `known`.
    """
    try:
        given = json.loads(body, parse_constant=_no_number)
    except RecursionError:
        raise InputError("the JSON is nested too deeply: give one object of numbers") from None
    except ValueError as e:  # also what is no UTF-8
        raise InputError(f"this is no JSON: {str(e)[:200]}") from e
    if not isinstance(given, dict):
        raise InputError('this must be an object, such as {"label": 0, "seed": 1}')
    if unknown := [name for name in given if name not in known]:
        raise InputError(f"no field {_shown(unknown[0])}: give some of {', '.join(known)}")
    return given


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def label_of(given: dict[str, Any], model: Model) -> int:
    """The class that an object asks for by number or name."""
    if "label" not in given:
        raise InputError("label is missing: give a class by number or by name")
    value, classes, known = given["label"], model.config.num_classes, model.card.classes
    if isinstance(value, str):
        if value.isascii() and value.isdigit() and len(value) < 9:
            value = int(value)  # a number counts as a number, also where classes are called so
        elif (value := known.number(name := value)) is None:
            such = f" or a name such as {known.names[0]}" if known.names else ""
            raise InputError(f"no class is called {_shown(name)}: give a number{such}")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= classes:
        raise InputError(
            f"label={_shown(value)}: give a class from 0 to {classes - 1} (or {classes} for none)"
        )
    return value


def guidance_of(value: Any, stages: int) -> tuple[float, ...]:
    """A scale for every stage, of one number or a list."""
    values = value if isinstance(value, list) else [value]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    # Compared before they become floats, which a whole number can be too large for
    if numbers != values or not all(-MOST_GUIDANCE <= v <= MOST_GUIDANCE for v in numbers):
        raise InputError(
            f"guidance={_shown(value)}: give numbers from -{MOST_GUIDANCE:g} to {MOST_GUIDANCE:g}"
        )
    if len(values) not in {1, stages}:
        raise InputError(f"guidance has {len(values)} scales: give 1, or {stages}, one a stage")
    return tuple(float(v) for v in (numbers if len(numbers) == stages else numbers * stages))


def whole_of(name: str, value: Any, least: int, most: int) -> int:
    """A whole number in a range."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(f"{name}={_shown(value)}: give a whole number from {least} to {most}")
    return value


def one_of(name: str, value: Any, known: tuple[str, ...]) -> str:
    """One of some words."""
    if value not in known:
        raise InputError(f"{name}={_shown(value)}: give one of {', '.join(known)}")
    return value


def _shown(value: Any) -> str:
    """What fits into a line."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return json.dumps(value)[:_SHOWN]
