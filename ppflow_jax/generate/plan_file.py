"""Plan files: what `ppflow tune` found for a model, as JSON.

    {"format": 1, "pyramid": TEXT, "flow": {...}, "cfg": [...], "times": [...], "stages": [...],
     "scales": [...], "rule": {...}, "weights": [[...]], "corrector": null, "made": {...},
     "forecast": {"place": "branch", "blocks": null, "depth": N, "slots": N, "full": [...],
                  "weights": [[...]]}}

`forecast` is there if some steps are (`systems.forecast_tables`): weights of the ring's slots, of
which the n-th full step of a stage writes slot n mod slots. With learned caching it is instead

    {"place": "router", "depth": N, "computed": ["1111", "0100", ...]}

(`systems.routed`): for every step, whether attention and MLP of each block in turn are computed.
`made` says from what: SHA-256 of the weights, calibration, errors, the command. It decides nothing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic
from ppflow_jax.files.place import place
from ppflow_jax.flow.fitted import Fitted
from ppflow_jax.flow.multistep import BASES, Rows, Rule
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import Segment
from ppflow_jax.pyramid import Pyramid
from ppflow_jax.systems.forecast_tables import ForecastTables
from ppflow_jax.systems.routed import PLACE, RoutedTables

FORMAT = 1
_MOST_STEPS = 10_000


@dataclass(frozen=True)
class PlanFile:
    """A fitted plan, and whose it is.

    Attributes:
      cfg: guidance scale of every stage that it was fitted with.
      cfg_channels: as in `flow.plan.SamplerConfig`.
      made: from what.
      forecast: of the steps that are not full, or which branches are computed.
    """

    fitted: Fitted
    pyramid: Pyramid
    flow: Flow
    cfg: tuple[float, ...]
    cfg_channels: int = 0
    made: dict[str, Any] = field(default_factory=dict)
    forecast: ForecastTables | RoutedTables | None = None

    def segments(self, fitted: Fitted) -> tuple[Segment, ...]:
        """Of the plan, which may have other guidance scales.

        Raises:
          InputError: scales that its forecasts do not fit.
        """
        return fitted.segments if not self.forecast else self.forecast.applied(fitted.segments)

    @property
    def sha256(self) -> str:
        """Of the file that `write` makes."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    def write(self, path: str | Path) -> None:
        """The same plan gives the same bytes."""
        with atomic(place(path)) as temporary:
            temporary.write_text(self._text())

    def _text(self) -> str:
        rows = self.fitted.rows
        corrector = None if rows.corrector is None else rows.corrector.tolist()
        values = {
            "format": FORMAT,
            "pyramid": str(self.pyramid),
            "flow": asdict(self.flow),
            "cfg": self.cfg,
            "cfg_channels": self.cfg_channels,
            "times": self.fitted.times,
            "stages": self.fitted.stages,
            "scales": self.fitted.scales,
            "rule": rows.rule._asdict(),
            "weights": rows.weights.tolist(),
            "corrector": corrector,
            "made": self.made,
        }
        if self.forecast is not None:
            values["forecast"] = self.forecast.values
        return json.dumps(values) + "\n"

    @classmethod
    def read(cls, path: str | Path) -> PlanFile:
        """
        Raises:
          InputError: not there, damaged, or no plan file.
        """
        path = place(path)
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as e:
            reason = getattr(e, "strerror", None) or "no text"
            raise InputError(
                f"cannot read the plan {path} ({reason}): give a file of `ppflow tune`"
            ) from e
        try:
            values = json.loads(text)
            if not isinstance(values, dict) or values.get("format") != FORMAT:
                raise ValueError(f"no plan of format {FORMAT}")
            return cls._of(values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            said = f"no {e}" if isinstance(e, KeyError) else str(e)
            raise InputError(
                f"{path} is not a plan of `ppflow tune`, or damaged ({said}): make it again"
            ) from e

    @classmethod
    def _of(cls, values: dict[str, Any]) -> PlanFile:
        pyramid = Pyramid.parse(str(values["pyramid"]))
        times, stages = _numbers(values, "times"), values["stages"]
        steps = len(times) - 1
        if not 1 <= steps <= _MOST_STEPS or (np.diff(np.float32(times)) <= 0).any():
            raise ValueError("times do not increase")
        if times[0] < 0 or times[-1] > 1:
            raise ValueError("times are not in [0, 1]")
        levels = range(len(pyramid))
        if len(stages) != steps or not all(type(s) is int and s in levels for s in stages):
            raise ValueError(f"stages are not {steps} numbers below {len(pyramid)}")
        scales, cfg = _numbers(values, "scales"), _numbers(values, "cfg")
        if len(scales) != steps or len(cfg) != len(pyramid):
            raise ValueError("scales are not one of every step, or cfg not one of every stage")
        rule = Rule(**values["rule"])
        if rule.basis not in BASES or type(rule.history) is not int or not 1 <= rule.history <= 32:
            raise ValueError(f"unknown rule {values['rule']}")
        weights = _table(values["weights"], steps, 1 + rule.history)
        corrector = None
        if bool(rule.corrects) != (values["corrector"] is not None):
            raise ValueError("a corrector without its rule, or a rule without its corrector")
        if rule.corrects:
            corrector = _table(values["corrector"], steps, 2 + rule.history)
        channels = values["cfg_channels"]
        if type(channels) is not int or channels < 0 or not isinstance(values["made"], dict):
            raise ValueError("cfg_channels or made of another kind")
        fitted = Fitted(times, tuple(stages), scales, Rows(rule, weights, corrector))
        forecast = None
        if "forecast" in values:
            forecast = _tables(values["forecast"], steps)
            forecast.applied(fitted.segments)
        flow, made = Flow(**values["flow"]), values["made"]
        return cls(fitted, pyramid, flow, cfg, channels, made, forecast)


def _tables(values: Any, steps: int) -> ForecastTables | RoutedTables:
    routed = isinstance(values, dict) and values.get("place") == PLACE
    return (RoutedTables if routed else ForecastTables).of(values, steps)


def _numbers(values: dict[str, Any], name: str) -> tuple[float, ...]:
    found = np.array(values[name], np.float64)
    if found.ndim != 1 or not np.isfinite(found).all():
        raise ValueError(f"{name} are not finite numbers")
    return tuple(found.tolist())


def _table(value: Any, rows: int, columns: int) -> np.ndarray:
    table = np.array(value, np.float64)
    if table.shape != (rows, columns) or not np.isfinite(np.float32(table)).all():
        raise ValueError(f"weights are not {rows} rows of {columns} finite numbers")
    return table
