"""Runs the commands in this process, as their users would."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
from pathlib import Path
from unittest import mock

import numpy as np
from absl import flags

from ppflow_jax import cli

ROOT = Path(__file__).parents[1]
REQUIRED = {
    "main": ("config",),
    "sample": ("checkpoint", "out"),
    "prepare": ("out",),
    "convert.rank": ("source", "target"),
    "evaluate": ("reference",),
}
_FLAGS: dict[str, dict[str, flags.Flag]] = {}  # of every command that has been loaded
POSITIONAL = {"report.__main__": "RUN...", "report.push": "RUN hf:OWNER/REPO"}
# A model that trains in seconds; 8 fake devices need a batch of 16 for two stages.
SMALL = [
    "--config.model.width=16",
    "--config.model.depth=1",
    "--config.model.heads=2",
    "--config.data.batch_size=16",
    "--config.train.steps=6",
    "--config.train.save_every=2",
    "--config.train.log_every=1",
    "--config.sample.every=0",
    "--config.sample.count=8",
    "--config.sample.solver=euler",
    "--config.sample.steps=2",
]


def run(name: str, *args: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python -m ppflow_jax.NAME ARGS`."""
    module = _load(name)
    out, err, code = io.StringIO(), io.StringIO(), 0
    _forget()
    with (
        mock.patch.object(sys, "argv", [module.__file__, *map(str, args)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.run(module.main, REQUIRED.get(name, ()), POSITIONAL.get(name, ""))
        except SystemExit as e:
            code = e.code
        finally:
            _forget()
            flags.FLAGS.mark_as_parsed()
    return code, out.getvalue(), err.getvalue()


def _forget() -> None:
    """Give every flag its default again."""
    flags.FLAGS.unparse_flags()
    for flag in list(flags.FLAGS):
        if flag.startswith("config."):  # made by the overrides of a run
            delattr(flags.FLAGS, flag)
        else:
            flags.FLAGS[flag].unparse()


def _load(name: str):
    """The command's module, with its flags registered and no other command's of the same name."""
    spec = importlib.util.find_spec(f"ppflow_jax.{name}")
    name = f"{spec.name}.__main__" if spec.submodule_search_locations else spec.name
    for other in _FLAGS:
        for flag in _FLAGS[other] if other != name else ():
            if flag in flags.FLAGS:
                delattr(flags.FLAGS, flag)
    module = importlib.import_module(name)
    if name not in _FLAGS:
        found = flags.FLAGS.flags_by_module_dict().get(name, [])
        _FLAGS[name] = {flag.name: flag for flag in found}
    for flag, value in _FLAGS[name].items():
        if flag not in flags.FLAGS:
            flags.FLAGS[flag] = value
    return module


def train(workdir: Path, *args: str, variant: str = "") -> tuple[int, str, str]:
    config = f"--config={ROOT}/configs/digits.py{variant}"
    return run("main", config, f"--workdir={workdir}", *SMALL, *args)


def weights(workdir: Path, which: str = "params") -> dict[str, np.ndarray]:
    """Parameters of the latest checkpoint by path."""
    import jax

    from ppflow_jax.checkpoints.card import read_card
    from ppflow_jax.checkpoints.weights import load_weights
    from ppflow_jax.devices.sharding import leaf_path, make_mesh
    from ppflow_jax.files.store import find_checkpoint

    path = find_checkpoint(workdir)
    params = load_weights(path, read_card(path), make_mesh(), which)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {leaf_path(p): np.asarray(v) for p, v in leaves}
