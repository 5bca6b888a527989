"""The same training run on several meshes and process counts, over fake CPU devices.

    python -m tests.acceptance.meshes --out=DIR [--steps=20]

A table of the largest relative difference of the losses from those of one process on one device
axis; runs that stop halfway and continue with another mesh and another number of processes; what
each process read against the whole batch; restored arrays against stored ones. Two processes stand
in for two slices. Exit code 0 only if losses agree within 1e-6 and the rest exactly.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from ppflow_jax.console import table
from ppflow_jax.data.pipeline import Stream
from ppflow_jax.data.sources import digits
from ppflow_jax.devices import processes
from ppflow_jax.devices.sharding import (
    batch_sharding,
    leaf_path,
    local_rows,
    make_mesh,
    tree_shardings,
)
from ppflow_jax.files.store import FOLDER
from ppflow_jax.train.metrics_log import read_metrics

DEVICES, BATCH, BOUND = 8, 32, 1e-6
SMALL = [
    "--config=configs/digits.py",
    "--config.model.width=64",
    "--config.model.depth=2",
    "--config.model.heads=4",
    f"--config.data.batch_size={BATCH}",
    "--config.optim.schedule=constant",
    "--config.train.log_every=1",
    "--config.sample.every=0",
    "--config.sample.count=8",
    "--config.sample.steps=2",
]
# Starts a module whose devices are in as many slices as there are processes.
AS_SLICES = """
import runpy, sys
from ppflow_jax.devices import slices
slices.slice_of = lambda device: device.process_index
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
# (processes, (data, fsdp, tensor, zero)); data, fsdp, tensor, replicas of fsdp groups (HSDP), and
# each of these with weights whole during a step
Run = tuple[int, tuple[int, int, int, int]]
MESHES: dict[str, Run] = {
    "1 process x 8, mesh 8x1": (1, (8, 1, 1, 3)),
    "1 process x 8, mesh 4x2": (1, (4, 2, 1, 3)),
    "1 process x 8, mesh 2x2x2": (1, (2, 2, 2, 3)),
    "1 process x 8, mesh 1x8, zero 2": (1, (1, 8, 1, 2)),
    "1 process x 8, mesh 2x4, zero 2": (1, (2, 4, 1, 2)),
    "2 processes x 4, mesh 8x1": (2, (8, 1, 1, 3)),
    "2 processes x 4, mesh 2x2x2": (2, (2, 2, 2, 3)),
    "2 processes x 4, mesh 1x8, zero 2": (2, (1, 8, 1, 2)),
    "2 slices x 4, mesh 2x4": (2, (2, 4, 1, 3)),
    "2 slices x 4, mesh 4x2, zero 2": (2, (4, 2, 1, 2)),
}
# name: two halves of one run
MOVES: dict[str, tuple[Run, Run]] = {
    "2x4 on 2x2x2, then 1x8 on 4x2": ((2, (2, 2, 2, 3)), (1, (4, 2, 1, 3))),
    "1x8 on 1x8, then 2x4 on 2x4": ((1, (1, 8, 1, 3)), (2, (2, 4, 1, 3))),
    "2x4 on 2x4 zero 2, then 1x8 on 8x1": ((2, (2, 4, 1, 2)), (1, (8, 1, 1, 3))),
    "1x8 on 2x2x2, then 1x8 on 1x8 zero 2": ((1, (2, 2, 2, 3)), (1, (1, 8, 1, 2))),
}


def start(
    processes: int, arguments: list[str], last: tuple[str, ...] = (), slices: bool = False
) -> list[int]:
    """Exit codes of that many processes of `python -m ...`, with eight devices in all.

    The last process also gets `last`. With `slices` each is a slice of its own.
    """
    run = ["-c", AS_SLICES] if slices else ["-m"]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES // processes),
    }
    if processes > 1:
        env |= {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(processes),
        }
    running = [
        subprocess.Popen(
            [sys.executable, *run, *arguments, *(last if k == processes - 1 else ())],
            env=env | ({"JAX_PROCESS_ID": str(k)} if processes > 1 else {}),
            stderr=subprocess.DEVNULL,
        )
        for k in range(processes)
    ]
    return [process.wait() for process in running]


def train(workdir: Path, run: Run, steps: int, slices: bool) -> None:
    names, (processes, sizes) = ("data", "fsdp", "tensor", "zero"), run
    mesh = [f"--config.mesh.{name}={size}" for name, size in zip(names, sizes)]
    extra = [f"--workdir={workdir}", f"--config.train.steps={steps}"]
    if any(start(processes, ["ppflow_jax.main", *SMALL, *mesh, *extra], slices=slices)):
        raise SystemExit(f"the run in {workdir} failed")


def losses(workdir: Path) -> np.ndarray:
    return np.array([r["loss"] for r in read_metrics(workdir / "metrics.jsonl")])


def read_share(out: Path, sizes: tuple[int, int, int]) -> None:
    """What this process reads of the first batches, to `out`/PROCESS.npz."""
    processes.initialize()
    rows = local_rows(batch_sharding(make_mesh(*sizes)), BATCH)
    read = list(itertools.islice(stream(rows), 3))
    index = jax.process_index()
    arrays = {k: np.stack([b[k] for b in read]) for k in ("x", "label")}
    np.savez(out / f"{index}.npz", rows=rows, **arrays)


def stream(rows=None):
    return Stream(digits(), BATCH, seed=0, num_classes=10, rows=rows).batches()


def shares_make_the_batch(out: Path) -> str:
    """Two processes' shares put together, against the batch of one."""
    sizes = (4, 2, 1)
    out.mkdir(parents=True, exist_ok=True)
    if any(start(2, ["tests.acceptance.meshes", f"--read={json.dumps(sizes)}", f"--out={out}"])):
        raise SystemExit("reading failed")
    read = list(itertools.islice(stream(), 3))
    whole = {k: np.stack([b[k] for b in read]) for k in ("x", "label")}
    shares = [np.load(out / f"{k}.npz") for k in range(2)]
    rows = np.concatenate([s["rows"] for s in shares])
    if sorted(rows.tolist()) != list(range(BATCH)):
        return "rows are missing or read twice"
    for name, value in whole.items():
        if not np.array_equal(np.concatenate([s[name] for s in shares], axis=1), value[:, rows]):
            return f"{name} differs"
    return "equal"


def restored_equals_stored(workdir: Path) -> str:
    """Every array of the latest state, restored onto three meshes of this process."""
    (*_, latest) = sorted((workdir / FOLDER).iterdir(), key=lambda p: int(p.name))
    checkpointer = ocp.PyTreeCheckpointer()
    stored = checkpointer.restore(
        latest / "state",
        restore_args=jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            ocp.PyTreeCheckpointHandler().metadata(latest / "state").tree,
        ),
    )
    paths = [leaf_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(stored)]
    for sizes in ((8, 1, 1), (2, 4, 1), (2, 2, 2)):
        shardings = tree_shardings(stored, make_mesh(*sizes))
        placed = checkpointer.restore(
            latest / "state",
            restore_args=jax.tree.map(
                lambda a, s: ocp.ArrayRestoreArgs(sharding=s, dtype=a.dtype), stored, shardings
            ),
        )
        pairs = zip(paths, jax.tree.leaves(stored), jax.tree.leaves(placed))
        if wrong := [path for path, a, b in pairs if not np.array_equal(a, np.asarray(b))]:
            return f"{wrong[0]} differs on {sizes}"
    return "equal"


def failure_ends_all(workdir: Path) -> str:
    """One of two processes cannot read its data; the other must not wait for ever."""
    missing = ("--config.data.source=arrays", "--config.data.path=/nowhere")
    began = time.monotonic()
    codes = start(2, ["ppflow_jax.main", *SMALL, f"--workdir={workdir}"], missing)
    print(f"  exit codes {codes} after {time.monotonic() - began:.0f} s", flush=True)
    return "all ended" if codes[1] == 1 and codes[0] != 0 else "not as it should"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="", help="runs whose name contains this, and the first")
    parser.add_argument("--read", default="", help="internal: one process of the reading check")
    args = parser.parse_args()
    if args.read:
        read_share(args.out, tuple(json.loads(args.read)))
        return 0
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)

    ok, reference = True, None
    rows = [("run", "last loss", "largest relative difference")]
    for name, halves in [(k, (v,)) for k, v in MESHES.items()] + list(MOVES.items()):
        if reference is not None and args.only not in name:
            continue
        workdir = args.out / name.replace(" ", "_").replace(",", "")
        for part, half in enumerate(halves, 1):
            train(workdir, half, args.steps * part // len(halves), "slices" in name)
        found = losses(workdir)
        reference = found if reference is None else reference
        complete = len(found) == args.steps
        worst = np.abs(found / reference - 1).max() if complete else np.inf
        ok &= bool(worst <= BOUND)
        rows.append((name, f"{found[-1]:.6f}", f"{worst:.1e}"))
    print(table(rows), flush=True)
    rows = []
    for name, answer in {
        "shares of two processes": shares_make_the_batch(args.out / "shares"),
        "restored on 8x1, 2x4, 2x2x2": restored_equals_stored(workdir),
        "one of two processes fails": failure_ends_all(args.out / "failing"),
    }.items():
        ok &= answer in ("equal", "all ended")
        rows.append((name, answer))
    print(table(rows, left=(0, 1)))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
