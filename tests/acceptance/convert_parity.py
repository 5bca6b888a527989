"""Converted weights against the public PyTorch implementation, through the commands.

    python -m tests.acceptance.convert_parity REFERENCE OUT

REFERENCE has the layout of tests/reference and all its files. For SiT and both PPFlow models the
weights are put into a `.pt` training checkpoint, converted with `ppflow_jax.convert` and sampled
with `ppflow_jax.sample` from the noise of the reference; forward outputs, guidance and whole
trajectories are compared with the converted parameters too. Then the two real `.pt` checkpoints:
the right entry, and bitwise back. Prints measured error beside bound, exit code 1 if over.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

from ppflow_jax.checkpoints.card import read_card
from ppflow_jax.checkpoints.weights import load_weights
from ppflow_jax.convert.names import Wanted
from ppflow_jax.convert.source import open_source
from ppflow_jax.convert.torch_writer import save_torch_file
from ppflow_jax.devices.sharding import make_mesh
from ppflow_jax.files.store import find_checkpoint
from tests.acceptance.comparison import Row, report
from tests.acceptance.parity import Case, forward, guidance, max_abs, nhwc, ode

# solver, points of the reference grid, with guidance, name and bound of what to compare
RUNS = (
    ("euler", 51, True, "euler_n51_cfg_traj", 2e-5),
    ("heun", 51, False, "heun2_n51_nocfg_traj", 2e-5),
    ("heun", 51, True, "heun2_n51_cfg_traj", 2e-5),
    ("heun", 250, True, "heun2_n250_cfg_final", 2e-5),
    ("dopri5", 51, True, "exact_cfg", 0.15),
)


def command(module: str, *flags: str) -> None:
    """Run one command of the package; the script ends with it if it fails."""
    print(f"$ python -m ppflow_jax.{module} {' '.join(flags)}", flush=True)
    subprocess.run(
        [sys.executable, "-m", f"ppflow_jax.{module}", *flags],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def convert(source: Path, target: Path, *flags: str) -> Path:
    command("convert", f"--source={source}", f"--target={target}", *flags)
    return target


def through_commands(case: Case, folder: Path) -> Iterator[Row]:
    """.pt -> checkpoint -> samples, compared as tests.acceptance.parity does."""
    other = {k: np.zeros_like(v) for k, v in case.state.items()}
    save_torch_file(folder / "model.pt", {"model": other, "ema": case.state, "opt": {}})
    target = convert(folder / "model.pt", folder / "converted", f"--heads={case.config.heads}")
    step = find_checkpoint(target)
    card = read_card(step)
    yield Row("architecture found", float(card.model != case.config), 0)
    case.params = load_weights(step, card, make_mesh())

    ref = case.load("ode")
    np.save(folder / "noise.npy", nhwc(ref["z"]))
    scales = ",".join(str(float(s)) for s in np.atleast_1d(ref["scales"]))
    for solver, points, guide, name, bound in RUNS:
        if name not in ref:
            continue
        out = folder / f"{solver}{points}{guide}"
        command(
            "sample",
            f"--checkpoint={target}",
            f"--out={out}",
            f"--noise={folder / 'noise.npy'}",
            f"--labels={','.join(map(str, ref['y']))}",
            f"--solver={solver}",
            f"--steps={points}",
            "--grid=reference",
            f"--cfg={scales if guide else 1}",
            "--cfg_channels=3",
            "--save_latents",
            "--nopngs",
        )
        theirs = ref[name] if name.endswith("final") else ref[name][-1]
        error = max_abs(np.load(out / "latents.npy"), nhwc(theirs)[: len(ref["z"])])
        yield Row(f"sample against {name}", error, bound)
    for name, check in {"forward": forward, "cfg": guidance, "ode": ode}.items():
        if (case.folder / f"{name}.npz").exists():
            arrays = case.load(name)
            for row in check(case, arrays):
                yield Row(f"{name}: {row.name}", row.error, row.bound, row.kind)


def real_checkpoint(reference: Path, level: int, folder: Path) -> Iterator[Row]:
    """Both entries of a `.pt` of the public trainer: bitwise there and back."""
    source = reference / f"checkpoint_l{level}.pt"
    for entry in ("ema", "model"):
        target = convert(source, folder / entry, "--heads=4", f"--weights={entry}")
        back = folder / f"{entry}.pt"
        command("convert", f"--source={target}", f"--target={back}", "--to=torch")
        state = open_source(str(source), Wanted(weights=entry)).state
        theirs = {k: v.read() for k, v in state.items()}
        ours = {k: v.read() for k, v in open_source(str(back)).state.items()}
        different = sum(
            name not in ours or value.tobytes() != ours[name].tobytes()
            for name, value in theirs.items()
        )
        yield Row(f"{entry} of {len(theirs)} tensors there and back", different, 0, "tensors")
        yield Row(f"{entry}: names", len(ours.keys() ^ theirs.keys()), 0, "tensors")
        if entry == "model":
            start = load_file(reference / f"ppflow_l{level}" / "model.safetensors")
            steps = np.load(reference / f"ppflow_l{level}" / "train_steps_fused.npz")
            for key in (k for k in steps if k.startswith("delta:")):
                name = key.removeprefix("delta:")
                yield Row(f"start + {key}", max_abs(ours[name] - start[name], steps[key]), 1e-7)


def checks(reference: Path, out: Path) -> dict[str, Callable[[], Iterator[Row]]]:
    """By the name of the folder that each of them makes in `out`."""
    found = {}
    for name in ("sit", "ppflow_l2", "ppflow_l3"):
        (out / name).mkdir(parents=True)
        found[name] = partial(through_commands, Case(reference / name), out / name)
    for level in (2, 3):
        name = f"checkpoint_l{level}"
        (out / name).mkdir()
        found[name] = partial(real_checkpoint, reference, level, out / name)
    return found


def main(argv: list[str]) -> int:
    if len(argv) != 3 or not Path(argv[1]).is_dir():
        print("usage: python -m tests.acceptance.convert_parity REFERENCE OUT")
        return 2
    reference, out = Path(argv[1]), Path(argv[2])
    with jax.default_matmul_precision("highest"):
        return report(
            replace(row, name=f"{name}: {row.name}")
            for name, check in checks(reference, out).items()
            for row in check()
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
