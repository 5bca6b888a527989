"""What a folder of kept runs was made with; runs with their guidance; fitted plans; seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from configs import common
from ppflow_jax import cli
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic


def same_settings(out: Path, *names: str) -> None:
    """A folder holds runs of one `--config` and one value of each of these flags; makes it.

    Settings that came after its runs must be at their defaults.

    Raises:
      InputError: it holds others.
    """
    values = flags.FLAGS
    mine: dict[str, Any] = {"config": json.loads(values.config.to_json_best_effort())}
    mine |= {name: values[name].value for name in names}
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    if not path.exists():
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(mine, indent=1))
        return
    theirs = _flat(json.loads(path.read_text()))
    defaults = _flat({"config": json.loads(common.get_config("S", "2x2@1").to_json())})
    for name, value in _flat(mine).items():
        if theirs.pop(name, defaults.get(name)) != value:
            raise InputError(f"{out} holds runs of another {name}: use another --out")
    if theirs:
        raise InputError(f"{out} holds runs with {next(iter(theirs))}: use another --out")


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Values by their path, "config.model.width"."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{above}{name}"
        found |= _flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found


def run_and_guidance(text: str) -> tuple[str, tuple[float, ...], str]:
    """The run, the guidance scales and the name of a folder for RUN@GUIDANCE.

    Raises:
      InputError: not of that form.
    """
    run, at, scales = text.rpartition("@")
    if not at:
        raise InputError(f"--run={text}: write RUN@GUIDANCE, as runs/l2@1,2")
    return run, cli.numbers("run", scales.split(",")), re.sub(r"[^\w.]+", "-", text).strip("-")


def tuned_plan(
    model: Any, file: Path, cfg: tuple[float, ...], evaluations: int, noises: int = 64
) -> Any:
    """A plan that `tune` fits to a model and its guidance scales; fitted once, kept in the file."""
    from ppflow_jax.tune.asked import Asked
    from ppflow_jax.tune.command import tune

    if not file.exists():
        tune(model, Asked(str(file), cfg, evaluations=evaluations, noises=noises))
    return model.plan(file)


def spread(values: Sequence[float], digits: str) -> str:
    """The mean of what seeds gave and, where they differ, the range; `digits` as in ".2f"."""
    low, high = min(values), max(values)
    mean = f"{sum(values) / len(values):{digits}}"
    return mean if low == high else f"{mean} ({low:{digits}} to {high:{digits}})"
