"""What the library is given, checked at the door, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from ppflow_jax.checkpoints.card import Card
from ppflow_jax.errors import InputError, check_seed
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.generate.images import choose_labels
from ppflow_jax.models.conditions import LABEL, Cond
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.pyramid import Pyramid

Labels = str | int | Sequence[int | str] | Int[np.ndarray, " _"]
# Values of the model's conditions by name: of every image, or of one for all
Values = Mapping[str, Any] | None
DTYPES = ("float32", "bfloat16")


class Samples(NamedTuple):
    """Images of a model: pictures uint8 [n, y, x, k], latents float32 [n, h, w, c], labels [n]."""

    pictures: UInt8[np.ndarray, "n y x k"]
    latents: Float[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"]


def seed_of(seed: int) -> int:
    """
    Raises:
      InputError: no whole number from 0 to 2^32 - 1.
    """
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool):
        raise InputError(f"seed={seed!r}: a seed is a whole number")
    check_seed(int(seed), "seed")
    return int(seed)


def whole(name: str, value: int | None) -> int:
    """
    Raises:
      InputError: no whole number from 1 on.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)


def count_of(num: int | None, labels: Labels, noise: np.ndarray | None) -> int:
    """Number of images: `num`, or as many as noise or labels, or 16.

    Raises:
      InputError: no whole number from 1 on, or another one than that of the noise.
    """
    if num is not None:
        whole("num", num)
    if noise is not None:
        if num not in (None, len(noise)):
            raise InputError(f"num={num}, but the noise holds {len(noise)} images")
        return len(noise)
    if num is not None:
        return int(num)
    if isinstance(labels, str):
        return 16 if labels in ("balanced", "uniform") else labels.count(",") + 1
    return len(np.atleast_1d(labels))


def conditions_of(conditions: Values, model: ModelConfig) -> dict[str, np.ndarray]:
    """Values of the model's conditions, float32, with a leading axis of images.

    Raises:
      InputError: other names than the model's, or values of other shapes, or not finite.
    """
    given, known = dict(conditions or {}), {c.name: c for c in model.asked}
    if given.keys() != known.keys():
        raise InputError(
            f"the model's conditions are {', '.join(known) or 'none'}, given are "
            f"{', '.join(map(str, given)) or 'none'}: {_said(known)}"
        )
    found = {}
    for name, condition in known.items():
        shape = condition.shape(model)
        try:
            array = np.asarray(given[name], np.float32)
        except (TypeError, ValueError) as e:
            raise InputError(f"condition {name} must be numbers: {e}") from e
        array = array[None] if array.shape == shape else array
        if array.shape[1:] != shape or array.ndim != len(shape) + 1 or not len(array):
            said = ", ".join(map(str, ("n", *shape)))
            raise InputError(f"condition {name} has shape {array.shape}, the model takes ({said})")
        if not np.isfinite(array).all():
            raise InputError(f"condition {name} has values that are NaN or infinite")
        found[name] = array
    return found


def _said(known: Mapping[str, Any]) -> str:
    if not known:
        return "leave them out"
    return f"give conditions={{{', '.join(f'{name!r}: array' for name in known)}}}"


def check_unconditional(model: ModelConfig, what: str) -> None:
    """
    Raises:
      InputError: the model has conditions, which `what` has no values for.
    """
    if model.asked:
        names = ", ".join(condition.name for condition in model.asked)
        raise InputError(
            f"the model's conditions are {names}, and {what} has no values for them: use "
            "python -m ppflow_jax.sample --conditions=FILE, or model.sample(conditions=...)"
        )


class Asked(NamedTuple):
    """Images that are asked for: how many, what the model is told about them, their noise."""

    num: int
    told: Cond
    noise: Float[np.ndarray, "n h w c"] | None

    @property
    def labels(self) -> Int[np.ndarray, " n"]:
        return np.asarray(self.told[LABEL] if isinstance(self.told, dict) else self.told)


def asked(
    card: Card,
    num: int | None,
    labels: Labels,
    seed: int = 0,
    noise: Any = None,
    conditions: Values = None,
) -> Asked:
    """
    Raises:
      InputError: an argument that does not fit the model, or numbers of images that differ.
    """
    start = None if noise is None else latents_of(noise, card.model.shape)
    values = conditions_of(conditions, card.model)
    rows = {name: len(value) for name, value in values.items() if len(value) > 1}
    if num is None and start is None and rows:
        num = max(rows.values())
    count = count_of(num, labels, start)
    return Asked(count, told_of(labels, values, count, seed, card), start)


def told_of(
    labels: Labels, values: Mapping[str, np.ndarray], count: int, seed: int, card: Card
) -> Cond:
    """What the model is told about `count` images: labels, or these and values by name.

    Raises:
      InputError: see `labels_of`; values of another number of images than `count` or one.
    """
    y = labels_of(labels, count, seed_of(seed), card)
    if not values:
        return y
    for name, value in values.items():
        if len(value) not in (1, count):
            raise InputError(
                f"condition {name} has values of {len(value)} images, asked for are {count}: give "
                "one of each, or one for all"
            )
    return {LABEL: y} | {k: np.broadcast_to(v, (count, *v.shape[1:])) for k, v in values.items()}


def labels_of(labels: Labels, count: int, seed: int, card: Card) -> Int[np.ndarray, " n"]:
    """Class of every image, see `choose_labels`.

    Raises:
      InputError: no rule, number or name of a class.
    """
    if isinstance(labels, str):
        rule = labels
    elif isinstance(labels, bool | float) or labels is None:
        raise InputError(f"labels={labels!r}: give balanced, uniform, a class or several")
    else:
        rule = ",".join(map(str, np.atleast_1d(labels).tolist()))
    return choose_labels(rule, count, card.model.num_classes, seed, card.classes)


def latents_of(x: Any, shape: tuple[int, int, int]) -> Float[np.ndarray, "b h w c"]:
    """
    Raises:
      InputError: no finite numbers of (n, *shape).
    """
    said = ", ".join(map(str, shape))
    try:
        array = np.asarray(x, np.float32)
    except (TypeError, ValueError) as e:
        raise InputError(f"latents must be numbers of shape (n, {said}): {e}") from e
    if array.ndim != 4 or array.shape[1:] != shape or not len(array):
        raise InputError(
            f"latents of shape {array.shape}, the model takes (n, {said}), channels last"
        )
    if not np.isfinite(array).all():
        raise InputError("latents have values that are NaN or infinite")
    return array


def stage_of(stage: int | None, ts: Float[np.ndarray, " b"], pyramid: Pyramid) -> int:
    """`stage`, or the one that all times are in.

    Raises:
      InputError: times outside [0, 1] or of several stages; no such stage.
    """
    if not ((ts >= 0) & (ts <= 1)).all():
        raise InputError(f"times are from 0 (noise) to 1 (data), got {ts.min()} to {ts.max()}")
    if stage is None:
        stages = {pyramid.stage_at(np.float32(t)) for t in np.unique(ts)}
        if len(stages) > 1:
            raise InputError(f"times of the stages {sorted(stages)} in one call: give stage=")
        stage = stages.pop()
    if stage not in range(len(pyramid)):
        raise InputError(f"stage={stage}: the model has stages 0 to {len(pyramid) - 1}")
    return stage


def config_of(
    steps: int,
    solver: str,
    cfg: float | int | Sequence[float | int],
    settings: dict[str, Any],
) -> SamplerConfig:
    """
    Raises:
      InputError: a setting that there is not, or a value out of its range.
    """
    known = [f.name for f in fields(SamplerConfig) if f.name not in ("steps", "solver", "cfg")]
    if unknown := [k for k in settings if k not in known]:
        raise InputError(f"plan has no setting {unknown[0]!r}: give some of {', '.join(known)}")
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise InputError(f"steps={steps!r}: give a whole number")
    if not isinstance(solver, str):
        raise InputError(f"solver={solver!r}: give text")
    try:
        scales = tuple(np.atleast_1d(np.asarray(cfg, float)).tolist())
        return SamplerConfig(solver, steps, cfg=scales, **settings)
    except InputError:
        raise
    except (TypeError, ValueError) as e:
        raise InputError(f"cfg={cfg!r} {settings or ''}: {e}") from e
