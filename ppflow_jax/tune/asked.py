"""What the command `tune` was asked for, and what every plan that it writes says of itself."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax

from ppflow_jax.api.inputs import config_of
from ppflow_jax.api.model import Model
from ppflow_jax.api.plans import sha256_of
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import writable_directory
from ppflow_jax.files.place import place
from ppflow_jax.tune.calibrate import FINE, Setting, Trajectories, calibrated

MOST_STEPS = 100  # with forecasts
ROUTER = "harmonica"


@dataclass(frozen=True)
class Asked:
    """What the flags of the command say.

    Either exactly one budget of evaluations, or forecasts: of what, steps, and how many are full;
    or learned caching: steps, and the share of their branches that is computed.

    Attributes:
      cfg: guidance scale, one or one of every stage.
      forecast: one of `systems.forecast.PLACES`, or `ROUTER`.
      schedule: of the full steps, one of `systems.forecast_calibrated.SCHEDULES`.
      fit_scales: refine the guidance scale of every guided step too.
      choose_patches: the patch of each of `evaluations` steps under one of the other budgets.
      calibration: folder of fine trajectories; None: that of `out`.
    """

    out: str = "plan.json"
    cfg: tuple[float, ...] = (1.0,)
    cfg_channels: int = 0
    evaluations: int | None = None
    flops: float | None = None
    ms: float | None = None
    noises: int = 256
    seed: int = 0
    calibration: str | None = None
    refine: bool = True
    fit_scales: bool = False
    choose_patches: bool = False
    forecast: str | None = None
    steps: int | None = None
    full: int | None = None
    schedule: str = "dp"
    share: float | None = None

    @property
    def command(self) -> str:
        """What makes the plan again, given the checkpoint."""
        default, flags = Asked(), []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("out", "calibration") or value == getattr(default, f.name):
                continue
            text = ",".join(f"{v:g}" for v in value) if f.name == "cfg" else str(value).lower()
            flags.append(f"--{f.name}={text}")
        return " ".join(["ppflow tune", *flags])

    def check_budget(self) -> None:
        """
        Raises:
          InputError: what only forecasts take, or not one budget.
        """
        forecasts = (self.steps, self.full, self.share)
        if any(v is not None for v in forecasts) or self.schedule != Asked.schedule:
            raise InputError(
                "--steps, --full, --share and --schedule are for forecasts: give "
                f"--forecast=branch, blocks, velocity or {ROUTER} too, or a budget as "
                "--evaluations=8 alone"
            )
        given = sum(b is not None for b in (self.evaluations, self.flops, self.ms))
        if self.choose_patches and (given != 2 or self.evaluations is None):
            raise InputError("--choose_patches needs --evaluations and a budget, --flops or --ms")
        if given != 1 and not self.choose_patches:
            raise InputError("give one budget: --evaluations=8, --flops=0.1 or --ms=5")
        if self.fit_scales and not self.refine:
            raise InputError("--fit_scales is part of the refinement: leave out --norefine")

    def check_forecast(self, stages: int) -> tuple[int, int]:
        """(steps, full ones).

        Raises:
          InputError: one missing or out of its range, or a budget of something else.
        """
        self._only(["share"], "--full of --steps")
        if self.steps is None or self.full is None:
            raise InputError(
                "--forecast needs --steps and how many are --full: --steps=20 --full=8"
            )
        if not stages <= self.full < self.steps <= MOST_STEPS:
            raise InputError(
                f"--full={self.full} of --steps={self.steps}: give at least a full step for each "
                f"of {stages} stage(s), and more steps than that, up to {MOST_STEPS}"
            )
        return self.steps, self.full

    def check_router(self, stages: int) -> tuple[int, float]:
        """(steps, share of their branches).

        Raises:
          InputError: one missing or out of its range, or a budget of something else.
        """
        self._only(["full"], "--share of --steps")
        if self.schedule != Asked.schedule:
            raise InputError(f"--schedule chooses full steps: leave it out with {ROUTER}")
        if self.steps is None or self.share is None:
            raise InputError(
                f"--forecast={ROUTER} needs --steps and the --share of their branches that is "
                "computed: --steps=20 --share=0.4"
            )
        if not stages < self.steps <= MOST_STEPS:
            raise InputError(
                f"--steps={self.steps}: give more than {stages}, a full one for each stage, and up "
                f"to {MOST_STEPS}"
            )
        return self.steps, self.share

    def _only(self, more: list[str], budget: str) -> None:
        """Refuse what is for plans without forecasts, and `more`."""
        names = ["evaluations", "flops", "ms", *more]
        others = [name for name in names if getattr(self, name) is not None]
        others += ["choose_patches"] * self.choose_patches + ["norefine"] * (not self.refine)
        others += ["fit_scales"] * self.fit_scales
        if others:
            raise InputError(
                f"--forecast with {', '.join(f'--{name}' for name in others)}: the budget of "
                f"{self.forecast} is {budget}; leave the rest out"
            )

    def scales(self, model: Model) -> tuple[float, ...]:
        """Guidance scale of every stage.

        Raises:
          InputError: another number of scales, or more guided channels than there are.
        """
        cfg = config_of(50, "ab2", self.cfg, {"cfg_channels": self.cfg_channels})
        if self.cfg_channels > model.config.channels:
            raise InputError(
                f"--cfg_channels={self.cfg_channels}: the model has {model.config.channels} "
                "channels"
            )
        return cfg.scales(model.config.pyramid)

    def target(self) -> Path:
        """Where the plan will be.

        Raises:
          InputError: a folder, or where nothing can be written.
        """
        out = place(self.out).absolute()
        writable_directory(out.parent)
        if out.is_dir():
            raise InputError(f"--out={self.out} is a folder: give the name of a file, as plan.json")
        return out

    def finest(self, model: Model) -> bool:
        """Whether patches are compared with the finest at all times: if it was trained on them."""
        times = ((model.card.experiment or {}).get("flow", {}).get("stage_times") or [(1, 1)])[-1]
        lo, hi = model.card.flow.sample_interval()
        return self.choose_patches and times[0] <= lo and hi <= times[1]

    def trajectories(
        self, model: Model, cfg: tuple[float, ...], out: Path
    ) -> tuple[Trajectories, Trajectories]:
        """To fit to, and held out; see `calibrated`."""
        setting = Setting(cfg, self.cfg_channels, self.noises, self.seed, self.finest(model))
        return calibrated(model, setting, self.calibration or out.parent)

    def made(self, model: Model, errors: dict[str, float], **others: Any) -> dict[str, Any]:
        """What a plan says of where it comes from."""
        return {
            "checkpoint_sha256": sha256_of(model.weights),
            "weights": model.weights.which,
            "dtype": model.dtype,
            "command": self.command,
            **others,
            "noises": self.noises,
            "seed": self.seed,
            "fine": f"heun, {FINE} steps" + ", finest patch" * self.finest(model),
            "held_out_errors": errors,
            "jax": jax.__version__,
        }
