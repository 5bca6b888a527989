"""What is read of a run's folder for the report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppflow_jax.api.plans import OWN
from ppflow_jax.checkpoints.card import Card, flat, read_card
from ppflow_jax.errors import InputError
from ppflow_jax.files.place import place
from ppflow_jax.files.store import find_checkpoint
from ppflow_jax.generate.plan_file import PlanFile
from ppflow_jax.train.metrics_log import read_metrics
from ppflow_jax.train.validate import EVALUATIONS


@dataclass(frozen=True)
class Run:
    """One training run, or one converted checkpoint.

    Attributes:
      name: folder name, or the whole path where names are not unique.
      checkpoint: folder of the latest step.
      metrics: rows of metrics.jsonl; empty if there is none.
      grids: sample grids of training, oldest first.
      evaluations: what `evaluate` wrote below the folder, oldest first: *.evaluation.json
        anywhere, and JSON files in `evaluations/` but those of training steps.
      plan: plan.json of `tune`, if it is there.
    """

    name: str
    folder: Path
    checkpoint: Path
    card: Card
    metrics: list[dict[str, Any]]
    grids: list[Path]
    evaluations: list[dict[str, Any]]
    plan: PlanFile | None = None

    @property
    def settings(self) -> dict[str, str]:
        """Configuration as `model.width: 128`."""
        values = self.card.to_json()
        experiment = values.pop("experiment")
        pairs = flat(experiment or values).items()
        return {key: v if isinstance(v, str) else json.dumps(v) for key, v in pairs}

    @property
    def decode(self) -> str:
        """How the run makes pictures of its samples: none, vae:DIR or taesd:DIR."""
        return (self.card.experiment or {}).get("sample", {}).get("decode", "none")


def open_runs(folders: Sequence[str]) -> list[Run]:
    """Runs in the order given.

    Raises:
      InputError: a folder without checkpoint, or named twice; a file that cannot be read.
    """
    paths = [place(folder).absolute() for folder in folders]
    if twice := [str(p) for p, n in Counter(paths).items() if n > 1]:
        raise InputError(f"{twice[0]} is given twice: name every run once")
    names = Counter(path.name for path in paths)
    return [
        _open(path, path.name if names[path.name] == 1 else given)
        for path, given in zip(paths, folders)
    ]


def _open(folder: Path, name: str) -> Run:
    checkpoint = find_checkpoint(folder)
    found = {*folder.rglob("*.evaluation.json"), *(folder / EVALUATIONS).glob("*.json")}
    # those of training steps are curves already
    found = {path for path in found if not path.name.startswith("step_")}
    written = sorted(found, key=lambda p: (p.stat().st_mtime, p))
    return Run(
        name,
        folder,
        checkpoint,
        read_card(checkpoint),
        read_metrics(folder / "metrics.jsonl"),
        sorted((folder / "samples").glob("step_*.png")),
        [_read(path) for path in written],
        PlanFile.read(folder / OWN) if (folder / OWN).is_file() else None,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
        return values | {"metrics": dict(values["metrics"]), "samples": dict(values["samples"])}
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path} is not what evaluate writes ({e!r}): remove it") from e


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in every run, with the value of each ("" where absent)."""
    names = dict.fromkeys(key for run in runs for key in run.settings)
    rows = [(key, [run.settings.get(key, "") for run in runs]) for key in names]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
