"""Golden values of training, sampling, checkpoints, dry run and plans, for moves of code.

    python -m tests.acceptance.golden          # compares with golden.json; exit code 1: it differs
    python -m tests.acceptance.golden --write  # pins again

Everything is read from the commands, so that it survives any move inside the package. The last bits
of losses and samples belong to one kind of processor and one version of jax: on others only the
numbers are compared, to 1e-5.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.commands import ROOT, SMALL

FILE = Path(__file__).with_name("golden.json")
VARIANTS = {"SiT": ":sit", "2 levels": "", "3 levels": ":levels3"}
TRAIN = [
    "--config.train.steps=3",
    "--config.train.save_every=3",
    "--config.data.batch_size=64",
    "--config.sample.steps=3",
]
EXACT = ("machine", "sha256")  # compared on the same machine only


def command(name: str, *args: object) -> str:
    """stdout of `python -m ppflow_jax.NAME ARGS` on one CPU device."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    line = [sys.executable, "-m", f"ppflow_jax.{name}", *map(str, args)]
    done = subprocess.run(
        line, cwd=ROOT, env=kept | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{line}: {done.stderr}")
    return done.stdout


def measure(folder: Path) -> dict[str, Any]:
    models = {}
    for name, variant in VARIANTS.items():
        run, out = folder / f"run{len(models)}", folder / f"samples{len(models)}"
        config = f"--config=configs/digits.py{variant}"
        command("main", config, f"--workdir={run}", *SMALL, *TRAIN)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        flags = (f"--checkpoint={run}", "--cfg=2", "--steps=6", "--labels=balanced")
        command("sample", *flags, f"--out={out}", "--num=8", "--save_latents")
        latents = np.load(out / "latents.npy")
        state = ocp.PyTreeCheckpointHandler().metadata(run / "checkpoints" / "3" / "state").tree
        leaves = jax.tree_util.tree_leaves_with_path(state)
        plan = command(
            "sample",
            *flags,
            "--explain",
            "--batch=4",
            "--accelerate=forecast.order=2,forecast.interval=3",
        )
        models[name] = {
            "steps": [{k: row[k] for k in row if k.startswith(("loss", "grad"))} for row in rows],
            "samples": [round(float(v), 7) for v in latents[:, ::4, ::4].ravel()],
            "sha256": {
                f: hashlib.sha256((out / f).read_bytes()).hexdigest()
                for f in ("latents.npy", "samples.npz")
            },
            "leaves": {jax.tree_util.keystr(p): list(leaf.shape) for p, leaf in leaves},
            "explain": plan.splitlines(),
        }
    mesh = ("--config.mesh.data=4", "--config.mesh.fsdp=2", "--config.data.batch_size=64")
    report = command("main", "--config=configs/digits.py", "--dry_run=cpu:8", *mesh)
    return {
        "machine": f"{processor()}, jax {jax.__version__}",
        "models": models,
        "dry run": [re.sub(r"[\d.]+ s\b", "* s", line) for line in report.splitlines()],
    }


def processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def differences(old: Any, new: Any, exact: bool, path: str = "") -> list[str]:
    """Where the two differ; numbers may differ by 1e-5 unless `exact`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [k for k in dict.fromkeys([*old, *new]) if exact or k not in EXACT]
        found = (differences(old.get(k), new.get(k), exact, f"{path}/{k}") for k in keys)
        return [line for lines in found for line in lines]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        found = (differences(a, b, exact, f"{path}/{k}") for k, (a, b) in enumerate(zip(old, new)))
        return [line for lines in found for line in lines]
    if not exact and isinstance(old, float) and np.isclose(old, new, rtol=1e-5, atol=1e-5):
        return []
    return [] if old == new else [f"{path}: {old} -> {new}"]


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        new = measure(Path(folder))
    if "--write" in sys.argv:
        FILE.write_text(json.dumps(new, indent=1) + "\n")
        return 0
    old = json.loads(FILE.read_text())
    exact = old["machine"] == new["machine"]
    found = differences(old, new, exact)
    print("\n".join(found))
    print(f"{len(found)} differences, {'bit for bit' if exact else 'to 1e-5: another machine'}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
