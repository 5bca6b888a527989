"""Kills a run with every recipe of training and compares what it becomes with one left alone.

    python -m tests.acceptance.kill_recipes --out=DIR [--kills=20] [--seed=0] [--trackers=NAME,...]

The run has Muon, wsd, post-hoc EMA, a bad example whose steps are left out, and the trackers that
are given, offline. It is killed by SIGKILL at random moments, the same command is given again until
it ends, and all of that as often as there are kills left. Exit code 0 only if the last states
(parameters, EMA, averages, moments, counts), all kept averages and the losses are those of the run
left alone, to the last bit, and MLflow and Trackio have the loss of every step once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from ppflow_jax.devices.sharding import leaf_path
from ppflow_jax.files.store import find_checkpoint, load_stored, stored_tree
from ppflow_jax.train.metrics_log import read_metrics
from ppflow_jax.train.posthoc import POSTHOC
from ppflow_jax.train.trackers import FILE, PROJECT

STEPS, SAVE_EVERY, BAD = 150, 5, 77
COMMAND = (
    *(sys.executable, "-m", "ppflow_jax.main", "--config=configs/digits.py:sit"),
    *("--config.data.source=arrays", "--config.data.batch_size=16"),
    *("--config.model.width=32", "--config.model.depth=2", "--config.model.heads=2"),
    *(f"--config.train.steps={STEPS}", f"--config.train.save_every={SAVE_EVERY}"),
    *("--config.train.log_every=1", "--config.sample.every=0", "--config.sample.count=1"),
    *("--config.sample.steps=1", "--config.optim.name=muon", "--config.optim.schedule=wsd"),
    *("--config.train.skip_nonfinite=2", "--config.train.posthoc_ema=(0.05,0.1)"),
)


def start(workdir: Path, trackers: str) -> subprocess.Popen[bytes]:
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "WANDB_MODE": "offline",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TRACKIO_DIR": str(workdir.parent / "trackio"),
    }
    more = [f"--config.train.trackers={tuple(trackers.split(','))}"] if trackers else []
    more += [f"--config.data.path={workdir.parent / 'data'}", f"--workdir={workdir}"]
    with workdir.with_suffix(".log").open("a") as log:
        return subprocess.Popen([*COMMAND, *more], env=env, stdout=log, stderr=log)


def data(folder: Path) -> None:
    if folder.exists():
        return
    folder.mkdir(parents=True)
    random_ = np.random.default_rng(0)
    x = random_.normal(size=(500, 8, 8, 1)).astype(np.float32)
    x[BAD] = 1e30
    np.save(folder / "latents.npy", x)
    np.save(folder / "labels.npy", random_.integers(0, 10, 500))


def arrays(path: Path) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(load_stored(path, stored_tree(path)))
    return {leaf_path(p): np.asarray(v) for p, v in leaves}


def everything(workdir: Path) -> dict[str, np.ndarray]:
    found = {f"state/{k}": v for k, v in arrays(find_checkpoint(workdir)).items()}
    for folder in sorted((workdir / POSTHOC).glob("*/*")):
        name = str(folder.relative_to(workdir))
        found |= {f"{name}/{k}": v for k, v in arrays(find_checkpoint(folder)).items()}
    rows = [r for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]
    found["steps"] = np.array([r["step"] for r in rows])
    found["losses"] = np.array([r["loss"] for r in rows])
    return found


def tracked(workdir: Path, name: str) -> list[tuple[int, float]] | None:
    """Steps and losses that a tracker has; None if it cannot be asked."""
    known = json.loads((workdir / FILE).read_text())
    if name == "mlflow":
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{workdir}/mlflow.db")
        return [(p.step, p.value) for p in client.get_metric_history(known["mlflow"], "loss")]
    if name == "trackio":
        import trackio

        rows = trackio.SQLiteStorage.get_logs(PROJECT, f"{workdir.name}-{known['id']}")
        return [(r["step"], r["loss"]) for r in rows if "loss" in r]
    return None


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trackers", default="")
    given = parser.parse_args()
    out, random_ = given.out.absolute(), random.Random(given.seed)
    os.environ["TRACKIO_DIR"] = str(out / "trackio")
    data(out / "data")
    began = time.monotonic()
    if start(out / "whole", "").wait():
        raise SystemExit(f"the run left alone fails: see {out}/whole.log")
    longest = time.monotonic() - began
    whole, failures, kills, chain = everything(out / "whole"), [], 0, 0
    while kills < given.kills:
        workdir, chain = out / f"killed-{chain}", chain + 1
        while (run := start(workdir, given.trackers)).poll() is None:
            try:
                run.wait(random_.uniform(0.3, 1) * longest if kills < given.kills else None)
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGKILL)
                kills += 1
            if (code := run.wait()) != -signal.SIGKILL:
                break
        ours = everything(workdir) if code == 0 else {}
        if code or ours.keys() != whole.keys():
            failures.append(f"{workdir.name}: exit code {code}, or other arrays")
        failures += [
            f"{workdir.name}: {k} differs"
            for k, v in whole.items()
            if code == 0 and not np.array_equal(v, ours.get(k))
        ]
        for name in filter(None, given.trackers.split(",")):
            expected = list(zip(whole["steps"].tolist(), whole["losses"].tolist()))
            if (found := tracked(workdir, name)) is not None and found != expected:
                lacking = set(expected) - set(found)
                failures.append(f"{name}: {len(found)} losses, {len(lacking)} of them lacking")
    skipped = int(whole["state/skipped/total"])
    print(f"{kills} kills, {chain} runs to the end, {skipped} of {STEPS} steps left out")
    print("\n".join(failures) or f"all {len(whole)} arrays are those of the run left alone")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
