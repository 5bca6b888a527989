"""Samples made in one go, killed and continued, by two processes, otherwise batched: the same.

    python -m tests.acceptance.sample_resume --checkpoint=DIR --out=DIR [--num=2000] [--kills=3] \
        [--seed=0] [-- FLAGS OF sample]

Each is `python -m ppflow_jax.sample --save_latents --nopngs` in processes of its own. Kills are
SIGKILL, once at a random moment of each of so many equal parts of the images. Exit code 0 only if
the arrays of samples.npz and latents.npy are equal to the last bit and the npz files to the byte.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

FILES = {"samples.npz": ("arr_0", "arr_1"), "latents.npy": (None,)}


def start(args: argparse.Namespace, name: str, *flags: str, **environment: str):
    command = [sys.executable, "-m", "ppflow_jax.sample", f"--checkpoint={args.checkpoint}"]
    command += [f"--out={args.out / name}", f"--num={args.num}", "--save_latents", "--nopngs"]
    return subprocess.Popen([*command, *flags, *args.extra], env=os.environ | environment)


def killed(args: argparse.Namespace) -> list[subprocess.Popen]:
    """Kill `args.kills` runs; the last one is left to finish."""
    moments, shards = random.Random(args.seed), args.out / "killed" / "shards"

    def done() -> int:
        return len([p for p in shards.glob("*.npy") if p.stem.isdecimal()])

    total = -(-args.num // 256)
    for part in range(args.kills):
        target = moments.randint(part * total // args.kills, (part + 1) * total // args.kills - 1)
        run = start(args, "killed")
        while done() < target and run.poll() is None:
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 1))
        if run.poll() is not None:
            raise SystemExit("the run had ended before it could be killed: give more --num")
        run.kill()
        run.wait()
        print(f"SIGKILL after {done()} of {total} shards", flush=True)
    return [start(args, "killed")]


def two_processes(args: argparse.Namespace) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        start(
            args,
            "processes",
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(k),
        )
        for k in range(2)
    ]


def arrays(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file, names in FILES.items():
        loaded = np.load(folder / file)
        found |= {f"{file}:{n}" if n else file: loaded[n] if n else loaded for n in names}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("extra", nargs="*")
    args = parser.parse_args()

    runs = {
        "whole": lambda: [start(args, "whole")],
        "killed": lambda: killed(args),
        "processes": lambda: two_processes(args),
        "batch": lambda: [start(args, "batch", "--batch=500")],
        "devices": lambda: [start(args, "devices", JAX_NUM_CPU_DEVICES="3")],
    }
    for name, begin in runs.items():
        if any([run.wait() for run in begin()]):
            print(f"{name} failed")
            return 1
    whole, equal = arrays(args.out / "whole"), True
    print("whole: " + ", ".join(f"{k} {v.dtype} {v.shape}" for k, v in whole.items()))
    for name in list(runs)[1:]:
        found = arrays(args.out / name)
        different = [k for k in whole if not np.array_equal(whole[k], found[k])]
        files = [(args.out / n / "samples.npz").read_bytes() for n in ("whole", name)]
        print(f"{name}: {len(whole)} arrays, {len(different)} differ {different}; ", end="")
        print(f"samples.npz {'equal' if files[0] == files[1] else 'NOT equal'} to the byte")
        equal &= not different and files[0] == files[1]
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
