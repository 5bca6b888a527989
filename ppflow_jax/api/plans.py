"""What a plan is asked for, checked at the door."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppflow_jax.api.inputs import config_of
from ppflow_jax.checkpoints.weights import Weights
from ppflow_jax.errors import InputError, check_address
from ppflow_jax.files.store import FOLDER, digest
from ppflow_jax.generate.plan import Plan, make_plan, tuned_plan
from ppflow_jax.generate.plan_file import PlanFile
from ppflow_jax.systems.accelerate import AccelerateConfig, with_preset

STEPS, SOLVER, ACCELERATE = 50, "heun", "exact"
AUTO, OWN = "auto", "plan.json"  # the plan in the folder of a run or a converted model

Guidance = float | int | Sequence[float | int] | None


def plan_of(
    weights: Weights,
    file: str | Path | PlanFile | None,
    steps: int,
    solver: str,
    cfg: Guidance,
    accelerate: str,
    weak: Weights | None,
    settings: dict[str, Any],
) -> Plan:
    """The plan of a file, or of settings.

    Raises:
      InputError: a setting that there is not or that the file decides, or a value out of its range.
    """
    if not isinstance(accelerate, str):
        raise InputError(f"accelerate={accelerate!r}: give text")
    if accelerate == AUTO and file is None:
        own = _home(weights.path) / OWN
        file, accelerate = (own, ACCELERATE) if own.is_file() else (None, "balanced")
    if file is None:
        config = config_of(steps, solver, 1.0 if cfg is None else cfg, settings)
        added = AccelerateConfig.parse(accelerate)
        config = with_preset(config, accelerate, weights.card.model)
        return make_plan(weights.card, config, added, weak, weights)
    given = {"steps": (steps, STEPS), "solver": (solver, SOLVER), "weak": (weak, None)}
    given["accelerate"] = accelerate, ACCELERATE
    if others := [k for k, (v, default) in given.items() if v != default] + list(settings):
        raise InputError(f"a plan file decides {', '.join(others)}: leave that out, or the file")
    if not isinstance(file, PlanFile):
        check_address(str(file), "plan", stores=True)
        file = PlanFile.read(file)
    scales = None if cfg is None else config_of(STEPS, SOLVER, cfg, {}).cfg
    return tuned_plan(weights.card, file, sha256_of(weights), scales)


def _home(path: Path) -> Path:
    """The folder of the run that a step is of, of a checkpoint alone, or the one a file lies in."""
    if path.parent.name == FOLDER:
        return path.parent.parent
    return path if path.is_dir() else path.parent


def sha256_of(weights: Weights) -> str:
    """Of the files of a checkpoint, or of a PyTorch file."""
    if weights.path.is_dir():
        return digest(weights.path)
    with weights.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
