"""What a client asks for, checked at the door."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from ppflow_jax.api.model import Model
from ppflow_jax.checks import SEEDS
from ppflow_jax.errors import InputError
from ppflow_jax.systems.accelerate import PRESETS

SOLVERS = ("heun", "euler")  # image k is then a function of its noise alone
MOST_STEPS, MOST_IMAGES, MOST_GUIDANCE = 250, 16, 100.0
_SHOWN = 60  # characters of a wrong value that an error repeats


@dataclass(frozen=True)
class Ask:
    """Images 0 to n - 1 of a seed, as `sample` makes them.

    Attributes:
      label: class; the number of classes itself is none.
      guidance: scale of every stage.
      preset: one of `systems.accelerate.PRESETS`.
    """

    label: int
    seed: int
    guidance: tuple[float, ...]
    steps: int = 50
    solver: str = SOLVERS[0]
    preset: str = "exact"
    n: int = 1


def parse(body: bytes, model: Model) -> Ask:
    """The request of a JSON body; what it leaves out is as in the command `sample`.

    Raises:
      InputError: no JSON object, a field that there is not, or a value out of its range.
    """
    given = _object(body)
    known = ("label", "seed", "guidance", "steps", "solver", "preset", "n")
    if unknown := [name for name in given if name not in known]:
        raise InputError(f"no field {_shown(unknown[0])}: give some of {', '.join(known)}")
    if "label" not in given:
        raise InputError("label is missing: give a class by number or by name")
    return Ask(
        _label(given["label"], model),
        _whole("seed", given.get("seed", 0), 0, SEEDS - 1),
        _guidance(given.get("guidance", 1), len(model.config.pyramid)),
        _whole("steps", given.get("steps", Ask.steps), 1, MOST_STEPS),
        _one_of("solver", given.get("solver", Ask.solver), SOLVERS),
        _one_of("preset", given.get("preset", Ask.preset), tuple(PRESETS)),
        _whole("n", given.get("n", Ask.n), 1, MOST_IMAGES),
    )


def _object(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body, parse_constant=_no_number)
    except RecursionError:
        raise InputError("the JSON is nested too deeply: give one object of numbers") from None
    except ValueError as e:  # also what is no UTF-8
        raise InputError(f"the body is no JSON: {str(e)[:200]}") from e
    if not isinstance(given, dict):
        raise InputError('the body must be an object, such as {"label": 0, "seed": 1}')
    return given


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _label(value: Any, model: Model) -> int:
    classes, known = model.config.num_classes, model.card.classes
    if isinstance(value, str):
        if value.isascii() and value.isdigit() and len(value) < 9:
            value = int(value)  # a number counts as a number, also where classes are called so
        elif (value := known.number(name := value)) is None:
            raise InputError(f"no class is called {_shown(name)}: /v1/model lists them")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= classes:
        raise InputError(
            f"label={_shown(value)}: give a class from 0 to {classes - 1} (or {classes} for none)"
        )
    return value


def _guidance(value: Any, stages: int) -> tuple[float, ...]:
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


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(f"{name}={_shown(value)}: give a whole number from {least} to {most}")
    return value


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise InputError(f"{name}={_shown(value)}: give one of {', '.join(known)}")
    return value


def _shown(value: Any) -> str:
    """What fits into a line."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return json.dumps(value)[:_SHOWN]
