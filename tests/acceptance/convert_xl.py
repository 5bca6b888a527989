"""Memory and time of converting the EMA of a large training checkpoint, and of the way back.

    python -m tests.acceptance.convert_xl --folder=DIR [--size=XL]

Writes DIR/checkpoint.pt (SiT-XL: 675 million parameters in float32 as `model`, `ema` and the two
moments of `opt`, 10.8 GB), converts it with the command, and prints wall time and the peak
resident memory of that process beside the bound. DIR needs 17 GB; what was written is removed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from ppflow_jax.convert.keys import key_table, position_values
from ppflow_jax.convert.source import open_source
from ppflow_jax.convert.torch_writer import save_torch_file
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.network import abstract_params
from ppflow_jax.pyramid import SIT


def state_dict(config: ModelConfig, seed: int, positions: bool) -> dict:
    """Makers of random tensors with the names and shapes of the PyTorch model."""
    noise = np.random.default_rng(seed).standard_normal(2**24, np.float32) * 0.02
    leaves = abstract_params(config)

    def make(entry, shape, start):
        values = np.resize(np.roll(noise, start), int(np.prod(shape))).reshape(shape)
        return np.ascontiguousarray(entry.theirs(values))

    state = {"pos_embed": lambda: position_values(config, 0)} if positions else {}
    for number, entry in enumerate(key_table(config)):
        leaf = leaves
        for part in entry.path:
            leaf = leaf[part]
        shape = leaf.shape[len(entry.index) :]
        state[entry.torch] = lambda e=entry, s=shape, n=number: make(e, s, 1009 * n + seed)
    return state


def write_checkpoint(path: Path, config: ModelConfig) -> None:
    """What the PyTorch training script saves; the moments are stored by parameter number."""
    moments = [state_dict(config, seed, False) for seed in (2, 3)]
    optimizer = {
        i: {"step": 1.0, "exp_avg": moments[0][name], "exp_avg_sq": moments[1][name]}
        for i, name in enumerate(moments[0])
    }
    tree = {name: state_dict(config, seed, True) for seed, name in enumerate(("model", "ema"))}
    save_torch_file(path, tree | {"opt": {"state": optimizer}, "args": {"model": "SiT-XL/2"}})


def run(*flags: str) -> tuple[float, float]:
    """Seconds and peak resident bytes of one command, its children included."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "ppflow_jax.convert", *flags])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {flags}")
    return time.monotonic() - start, usage.ru_maxrss * 1024


def main() -> None:
    """Write, convert, go back, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="XL")
    args = parser.parse_args()
    config = ModelConfig(
        pyramid=SIT, latent_size=32, channels=4, num_classes=1000, **SIZES[args.size]
    )
    args.folder.mkdir(parents=True)
    try:
        source, target = args.folder / "checkpoint.pt", args.folder / "converted"
        start = time.monotonic()
        write_checkpoint(source, config)
        print(f"{source}: {source.stat().st_size / 1e9:.2f} GB in {time.monotonic() - start:.0f} s")
        state = open_source(str(source)).state
        weights = sum(ref.nbytes for ref in state.values())
        bound = 1.5 * weights + 1e9
        print(f"selected weights: {weights / 1e9:.3f} GB, bound {bound / 1e9:.2f} GB")
        seconds, peak = run(f"--source={source}", f"--target={target}")
        print(f"convert the EMA: {seconds:.1f} s (bound 180), peak {peak / 1e9:.2f} GB", flush=True)
        back = args.folder / "back.pt"
        s, p = run(f"--source={target}", f"--target={back}", "--to=torch")
        print(f"back to PyTorch: {s:.1f} s, peak {p / 1e9:.2f} GB", flush=True)
        again = open_source(str(back)).state
        same = again.keys() == state.keys() and all(
            np.array_equal(ref.read(), again[name].read()) for name, ref in state.items()
        )
        print(f"round trip of {len(state)} tensors bitwise equal: {same}")
    finally:
        shutil.rmtree(args.folder)
    if not same or seconds > 180 or peak > bound:
        sys.exit("over the bound")


if __name__ == "__main__":
    main()
