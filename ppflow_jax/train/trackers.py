"""Weights & Biases, MLflow and Trackio beside the files of a run: config.train.trackers.

Where they log, and whether they need an account, is as their own environment variables say. Each is
told once what the run is called, which `WORKDIR/trackers.json` keeps: a run that goes on is the
same run there.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from ppflow_jax.checkpoints.card import flat
from ppflow_jax.console import say
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic
from ppflow_jax.files.place import is_object
from ppflow_jax.files.store import reason
from ppflow_jax.train.metrics_log import Tracker

PROJECT = "ppflow_jax"
FILE = "trackers.json"
SAMPLES = "samples"  # what they call the sample grids
_MLFLOW = "MLFLOW_TRACKING_URI"
PARAMS = 100  # settings that MLflow takes at once


def check_trackers(names: Sequence[str]) -> None:
    """
    Raises:
      InputError: an unknown name, one that is there twice, or one that is not installed.
    """
    if unknown := [name for name in names if name not in TRACKERS]:
        raise InputError(
            f"config.train.trackers: unknown {unknown[0]!r}, expected some of {', '.join(TRACKERS)}"
        )
    if len(set(names)) < len(names):
        raise InputError(f"config.train.trackers: {', '.join(names)}: name each once")
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, with logs, is no package
            raise InputError(
                f"config.train.trackers: {name} is not installed: "
                f"pip install 'ppflow_jax[{name}]', or leave it out"
            )


def check_place(names: Sequence[str], workdir: str | Path) -> None:
    """
    Raises:
      InputError: a tracker that would keep its database in an object store.
    """
    if MLflow.name in names and is_object(workdir) and not os.environ.get(_MLFLOW):
        raise InputError(
            f"config.train.trackers: mlflow keeps a database, which {workdir} cannot hold: set "
            f"{_MLFLOW} to a server, or to a file such as sqlite:///mlflow.db"
        )


def open_trackers(
    names: Sequence[str], workdir: Path, experiment: dict[str, Any]
) -> tuple[Tracker, ...]:
    """The trackers of a run, begun or going on; none in processes other than 0.

    Of a workdir in an object store it is said which keeps its files on this machine, and where.

    Args:
      experiment: the settings of the run.

    Raises:
      InputError: one cannot be opened.
    """
    if not names or jax.process_index():
        return ()
    known = _known(workdir / FILE)
    opened = []
    for name in names:
        try:
            opened.append(TRACKERS[name](workdir, known, experiment))
        except Exception as e:  # each library has its own
            raise InputError(
                f"config.train.trackers: {name} does not open the run of {workdir} "
                f"({reason(e)}): {HELP[name]}, or leave it out"
            ) from e
        with atomic(workdir / FILE) as temporary:
            temporary.write_text(json.dumps(known, indent=1) + "\n")
        if is_object(workdir) and (where := opened[-1].where):
            say(f"{name} keeps its files on this machine, in {where}: they do not go to {workdir}")
    return tuple(opened)


def _known(path: Path) -> dict[str, str]:
    """What the trackers call the run: `id`, made here, and ids that they made."""
    if not path.exists():
        return {"id": uuid.uuid4().hex[:8]}
    try:
        values = json.loads(path.read_text())
        return {str(name): str(value) for name, value in ({"id": values["id"]} | values).items()}
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"cannot read {path} ({e!r}): mend it, or remove it to begin new runs in the trackers"
        ) from e


def _later(values: dict[str, float], step: int, last: dict[str, int]) -> dict[str, float]:
    """Those of the values that the tracker does not have yet: of steps after its `last`, by name.

    A run that was killed repeats the steps after its checkpoint, with the same values.
    """
    return {name: value for name, value in values.items() if step > last.get(name, -1)}


class WandB:
    """Weights & Biases; WANDB_MODE=offline needs no account, and `wandb sync` sends it later."""

    name = "wandb"

    def __init__(self, workdir: Path, known: dict[str, str], experiment: dict[str, Any]):
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=known["id"],
            name=workdir.name,
            resume="allow",
            dir=None if is_object(workdir) else str(workdir),
            config=experiment,
            settings=wandb.Settings(console="off"),
        )
        self.where = str(Path(self._run.dir).parent) if self._run.offline else ""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)  # it keeps no step twice by itself

    def picture(self, step: int, path: Path) -> None:
        self._run.log({SAMPLES: self._image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow; without MLFLOW_TRACKING_URI in `WORKDIR/mlflow.db`, for `mlflow server` to show."""

    name = "mlflow"

    def __init__(self, workdir: Path, known: dict[str, str], experiment: dict[str, Any]):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._last = Metric, dict[str, int]()
        check_place((self.name,), workdir)
        uri = os.environ.get(_MLFLOW)
        self.where = uri if (uri or "").startswith(("sqlite:", "file:", "/", ".")) else ""
        self._client = MlflowClient(uri or f"sqlite:///{workdir}/mlflow.db")
        self._begun = self.name in known
        if self._begun:
            self._client.update_run(known[self.name], status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(name)
            place = None if uri else (workdir / "mlartifacts").as_uri()
            kind = found.experiment_id if found else self._client.create_experiment(name, place)
            run = self._client.create_run(kind, run_name=workdir.name)
            known[self.name] = run.info.run_id
            params = [Param(key, str(value)) for key, value in flat(experiment).items()]
            for start in range(0, len(params), PARAMS):
                part = params[start : start + PARAMS]
                self._client.log_batch(run.info.run_id, params=part)
        self._run = known[self.name]
        self._client.log_dict(self._run, experiment, "config.json")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name in values.keys() - self._last.keys() if self._begun else ():
            history = self._client.get_metric_history(self._run, name)
            self._last[name] = max((point.step for point in history), default=-1)
        now = int(1000 * time.time())
        points = [
            self._metric(k, v, now, step) for k, v in _later(values, step, self._last).items()
        ]
        self._client.log_batch(self._run, metrics=points)

    def picture(self, step: int, path: Path) -> None:
        self._client.log_artifact(self._run, str(path), SAMPLES)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class Trackio:
    """Trackio, in its local database (TRACKIO_DIR), for `trackio show`."""

    name = "trackio"

    def __init__(self, workdir: Path, known: dict[str, str], experiment: dict[str, Any]):
        import trackio

        self.where = str(trackio.utils.TRACKIO_DIR)
        self._image = trackio.Image
        run = f"{workdir.name}-{known['id']}"
        self._run = trackio.init(
            PROJECT,
            name=run,
            resume="allow",
            config=experiment,
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        self._last: dict[str, int] = {}
        for row in trackio.SQLiteStorage.get_logs(PROJECT, run):
            self._last |= dict.fromkeys(row, row["step"])

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if later := _later(values, step, self._last):
            self._run.log(later, step=step)

    def picture(self, step: int, path: Path) -> None:
        if step > self._last.get(SAMPLES, -1):
            self._run.log({SAMPLES: self._image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, dict[str, str], dict[str, Any]], Tracker]] = {
    kind.name: kind for kind in (WandB, MLflow, Trackio)
}
HELP = {
    "wandb": "log in (wandb login), or set WANDB_MODE=offline",
    "mlflow": f"set {_MLFLOW} to where the run began, or remove {FILE} to begin anew",
    "trackio": "see that TRACKIO_DIR can be written",
}
