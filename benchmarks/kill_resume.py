"""Kills a training run with SIGKILL at random moments and compares it with one left alone.

    python -m benchmarks.kill_resume --out=DIR [--kills=3] [--seed=0] [-- FLAGS OF main]

Both runs are `python -m ppflow_jax.main --config=configs/digits.py`. Exit code 0 only if every
array of the final training state (parameters, EMA, moments) is equal to the last bit.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from ppflow_jax.checkpoint import find_checkpoint
from ppflow_jax.sharding import leaf_path
from ppflow_jax.writers import read_metrics


def start(workdir: Path, extra: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "ppflow_jax.main", "--config=configs/digits.py"]
    return subprocess.Popen([*command, f"--workdir={workdir}", *extra])


def reached(workdir: Path) -> int:
    """Last step that was logged."""
    return max((r["step"] for r in read_metrics(workdir / "metrics.jsonl")), default=0)


def final_state(workdir: Path) -> tuple[str, dict[str, np.ndarray]]:
    path = find_checkpoint(workdir)
    leaves = jax.tree_util.tree_leaves_with_path(ocp.PyTreeCheckpointer().restore(path / "state"))
    return path.name, {leaf_path(p): np.asarray(v) for p, v in leaves}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("extra", nargs="*")
    args = parser.parse_args()

    if start(args.out / "whole", args.extra).wait():
        return 1
    steps = reached(args.out / "whole")
    moments = random.Random(args.seed)
    for target in sorted(moments.randrange(1, steps) for _ in range(args.kills)):
        run = start(args.out / "killed", args.extra)
        while reached(args.out / "killed") < target and run.poll() is None:
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 2))
        if run.poll() is not None:
            print("the run had ended before it could be killed")
            return 1
        run.kill()
        run.wait()
        print(f"SIGKILL at step {reached(args.out / 'killed')} of {steps}", flush=True)
    if start(args.out / "killed", args.extra).wait():
        return 1
    (step_a, a), (step_b, b) = (final_state(args.out / name) for name in ("whole", "killed"))
    different = [k for k in a if not np.array_equal(a[k], b.get(k))]
    print(f"steps {step_a} and {step_b}; {len(a)} arrays, {len(different)} differ {different[:3]}")
    return 0 if step_a == step_b and a.keys() == b.keys() and not different else 1


if __name__ == "__main__":
    sys.exit(main())
