"""Continuing a run: what has changed since its last checkpoint, and what its settings were."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ppflow_jax.checkpoints.card import Card, flat
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic
from ppflow_jax.train.experiment import Experiment
from ppflow_jax.train.optimizer import DECAYING, decay_start

CONFIG = "config.json"
# How a run is computed, watched and stored, not what: the numbers are equal but for rounding. What
# the data is, `trained_on` knows. All other settings must stay as they are.
FREE = (
    *("init_from", "sample", "eval", "mesh", "model.attention", "model.remat"),
    *("data.path", "data.vae", "data.workers", "data.unreadable", "data.stage"),
    *("train.accumulate", "train.log_every", "train.save_every", "train.keep"),
    *("train.skip_nonfinite", "train.trackers", "mesh.zero", "mesh.auto"),
)
# These decide which tokens of a mixture are dropped, if any.
DROPPING = ("mesh.expert", "mesh.capacity")
LATE = (*FREE, *DROPPING)  # may begin when a run continues
# Settings that are younger than some runs, with the value that those had.
BEFORE = {
    "train.ema_warmup": False,
    "model.ffn": "mlp",
    "model.wrap": "none",
    "model.network": "none",
    "model.mixer": "attention",
    "model.norm": "none",
    "model.conditions": [],
    "data.task": "none",
    "model.adapters": "none",
    "model.students": "none",
    "train.trainable": [".*"],
    "flow.balance": 0.01,
    "flow.prior": 1.0,
    "flow.complete": 1.0,
    "flow.terms": [],
    "flow.shift": 1.0,
    "flow.times": "uniform",
    "flow.objective": "flow",
    "train.teacher": "",
    "data.fields": [],
    "train.phases": [],
    "data.stage": "",
    "train.skip_nonfinite": 0,
    "train.posthoc_ema": [],
    "train.trackers": [],
    "optim.name": "adamw",
    "optim.decay_share": 0.2,
    "mesh.zero": 3,
    "mesh.auto": False,
    "mesh.expert": 1,
    "mesh.capacity": 2.0,
}
# Settings with which a run has other arrays, and what a checkpoint of others holds
STATE = {
    "train.trainable": "another part of the weights",
    "optim.name": "the state of another optimizer",
    "train.posthoc_ema": "other averages",
}
_DATA = "trained_on."
_LABELS = "trained_on.labels."  # follow from the rest of the data's identity
_MODEL = ("model.", "flow.path", "flow.prediction")  # of which cards know the differences
_ABSENT = "none"


class Change(NamedTuple):
    """A setting that is not what it was; `free` if training computes the same numbers."""

    name: str
    before: Any
    now: Any
    free: bool

    def __str__(self) -> str:
        return f"{self.name}: {_shown(self.before)} -> {_shown(self.now)}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def changes(before: dict[str, Any], now: dict[str, Any], step: int) -> list[Change]:
    """What differs between the experiments of two cards when a run continues from `step`.

    Of the data's identity only what both have is compared: an older one has less to say. The
    number of steps is free but for the schedule of the steps that are left.
    """
    new = flat(now)
    old = {name: BEFORE[name] for name in LATE if name in BEFORE and name in new} | flat(before)

    def free(name: str) -> bool:
        if name.startswith(_DATA):
            return _place(name)
        if name in DROPPING:
            return new.get("mesh.expert", 1) == old.get("mesh.expert", 1) == 1
        if name == "train.steps":
            return new[name] == step or not (_schedules_end(old, step) or _schedules_end(new, step))
        return any(name == f or name.startswith(f"{f}.") for f in FREE)

    found = []
    for name in dict.fromkeys([*new, *old]):
        if name.startswith(_LABELS):
            continue
        if name not in old or name not in new:
            if name not in BEFORE and not name.startswith(_DATA):
                pair = old.get(name, _ABSENT), new.get(name, _ABSENT)
                found += [Change(name, *pair, free=True)] if pair[0] != pair[1] else []
        elif old[name] != new[name]:
            found.append(Change(name, old[name], new[name], free(name)))
    return found


def _schedules_end(values: dict[str, Any], step: int) -> bool:
    """Whether the learning rates up to `step` depend on the number of steps, in flat settings."""
    schedule = values.get("optim.schedule")
    if schedule in DECAYING:
        return step > decay_start(values["train.steps"], values["optim.decay_share"])
    return schedule == "cosine"


def _place(name: str) -> bool:
    """Whether a part of the data's identity says where it lies, and not what it is."""
    return name.rpartition(".")[2] in ("path", "name")


def going_on(experiment: Experiment, step: int, stored: Card, path: Path) -> Experiment:
    """`experiment` as the run continues with it whose checkpoint in `path` has the card `stored`.

    Prints what has changed. A setting that the run is older than keeps the value that the run had,
    and stays absent from its card.

    Raises:
      InputError: another model; settings that change what is trained, without
        `config.resume_changed`; no checkpoint of a run.
    """
    card, config = experiment.card, experiment.config
    if stored.experiment is None:
        raise InputError(
            f"{path} holds converted weights, not a run to continue: give it as "
            "--config.init_from, and another --workdir"
        )
    found = changes(stored.experiment, card.experiment, step)
    refused = [c for c in found if not c.free]
    if difference := stored.differences(card):
        others = [str(c) for c in refused if not c.name.startswith(_MODEL)]
        raise InputError(
            f"{path} is a checkpoint of another model ({', '.join([difference, *others])}): use "
            "another --workdir, or the configuration it was made with"
        )
    if other := next((c for c in found if c.name in STATE), None):
        raise InputError(
            f"{path} holds {STATE[other.name]} ({other}): use another --workdir, with this one as "
            "--config.init_from"
        )
    if refused and not config.get("resume_changed"):
        raise InputError(
            f"{path} was made with other settings ({_listed(refused)}), and these change what is "
            "trained: give them as they were, use another --workdir, or add "
            "--config.resume_changed=true to continue with the new ones"
        )
    younger = BEFORE.keys() - flat(stored.experiment).keys() - set(LATE)
    if jax.process_index() == 0:
        if found:
            print(f"changed since step {step}: {_listed(found)}", flush=True)
        for name in sorted(n for n in younger if flat(card.experiment)[n] != BEFORE[n]):
            print(
                f"this run is older than config.{name} and continues with {_shown(BEFORE[name])}",
                flush=True,
            )
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({name: BEFORE[name] for name in younger})
    card = replace(card, experiment=_without(card.experiment, younger), base=stored.base)
    return replace(experiment, config=config, card=card)


def _listed(found: list[Change]) -> str:
    return ", ".join(map(str, found))


def _without(values: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """A copy of nested `values` without `names`, each as `group.name`."""
    values = copy.deepcopy(values)
    for name in names:
        group, _, key = name.partition(".")
        del values[group][key]
    return values


def record(root: Path, card: Card, step: int) -> None:
    """Write `card` to the workdir's config.json, with the history of the run's experiments.

    `history` has `from_step` and `experiment` of every one, the last one being that of the card;
    it only ever grows.

    Raises:
      InputError: the file that is there cannot be read.
    """
    path = root / CONFIG
    history = _history(path)
    if not history or changes(history[-1]["experiment"], card.experiment, step):
        history.append({"from_step": step, "experiment": card.experiment})
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(card.to_json() | {"history": history}, indent=1))


def _history(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        values = json.loads(path.read_text())
        first = {"from_step": 0, "experiment": values["experiment"]}  # older files have no history
        history = values.get("history", [first])
        return [{k: entry[k] for k in ("from_step", "experiment")} for entry in history]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(
            f"cannot read {path} ({e}): mend it, or move it away to begin the history of the "
            "run's settings again"
        ) from e
