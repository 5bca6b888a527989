"""Ends training runs in every way and compares what they become with runs left alone.

    python -m tests.acceptance.kill_resume --out=DIR [--kills=30] [--seed=0] [--only=NAME,...]

A small model is trained by `python -m ppflow_jax.main`. Runs are killed by SIGKILL at random
moments (while starting, between steps, while a checkpoint is written; with two processes, one of
them; `python -m ppflow_jax.prepare` while it writes shards), stopped by SIGTERM, refused by a full
disk, and their checkpoints are damaged afterwards; the same command is then given again until it
ends. Prints a table. Exit code 0 only if every final training state (parameters, EMA, moments) and
every cache is that of a run left alone, to the last bit, and every refusal was one line and left
the checkpoint before as it was.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from ppflow_jax.autoencoders.autoencoder import Autoencoder
from ppflow_jax.autoencoders.decode import save_autoencoder
from ppflow_jax.autoencoders.taesd import TAESDConfig
from ppflow_jax.console import table
from ppflow_jax.devices.sharding import leaf_path
from ppflow_jax.files.store import find_checkpoint, load_stored, steps_in, stored_tree, verify
from ppflow_jax.train.metrics_log import read_metrics

STEPS, SAVE_EVERY = 120, 12
COMMAND = [
    *(sys.executable, "-m", "ppflow_jax.main", "--config=configs/digits.py"),
    "--config.data.source=arrays",
    "--config.model.width=32",
    "--config.model.depth=1",
    "--config.model.heads=2",
    "--config.data.batch_size=16",
    f"--config.train.steps={STEPS}",
    f"--config.train.save_every={SAVE_EVERY}",
    "--config.train.log_every=1",
    "--config.sample.every=0",
    "--config.sample.count=2",
    "--config.sample.steps=2",
]
PATIENCE = 600  # seconds; a run that takes longer hangs


@dataclass
class Row:
    """A line of the table."""

    name: str
    ended: int = 0  # how many times a run was ended
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class Run:
    """`main` in one or more processes on one device each, until all have ended."""

    def __init__(self, workdir: Path, processes: int = 1, cache: bool = True):
        self.workdir, self.log = workdir, workdir.with_suffix(".log")
        workdir.parent.mkdir(parents=True, exist_ok=True)
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        if cache:  # start-up is most of the time; the run left alone compiles for itself
            env["JAX_COMPILATION_CACHE_DIR"] = str(workdir.parent.absolute() / "compiled")
            env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        if processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                env["JAX_COORDINATOR_ADDRESS"] = f"localhost:{free.getsockname()[1]}"
            env["JAX_NUM_PROCESSES"] = str(processes)
        self.started = time.monotonic()
        with self.log.open("w") as log:
            self.processes = [
                subprocess.Popen(
                    [
                        *COMMAND,
                        f"--config.data.path={data(workdir.parent)}",
                        f"--workdir={workdir}",
                    ],
                    env=env | ({"JAX_PROCESS_ID": str(i)} if processes > 1 else {}),
                    stdout=log,
                    stderr=log,
                )
                for i in range(processes)
            ]

    def alive(self) -> bool:
        return all(p.poll() is None for p in self.processes)

    def wait(self) -> list[int]:
        try:
            return [p.wait(PATIENCE) for p in self.processes]
        except subprocess.TimeoutExpired:
            for p in self.processes:
                p.kill()
            raise SystemExit(f"a process hangs: see {self.log}") from None

    def finished(self) -> bool:
        return self.wait() == [0] * len(self.processes)

    def step(self) -> int:
        """Last step that was logged."""
        return max((r["step"] for r in read_metrics(self.workdir / "metrics.jsonl")), default=0)

    def writing(self) -> bool:
        """Whether a checkpoint is half-written."""
        folder = self.workdir / "checkpoints"
        return folder.is_dir() and any("tmp" in p.name for p in folder.iterdir())


def data(out: Path) -> Path:
    """Random pictures; the digits would cost an import of scikit-learn at every start."""
    folder, random_ = out / "data", np.random.default_rng(0)
    if not folder.exists():
        folder.mkdir()
        np.save(folder / "latents.npy", random_.normal(size=(500, 8, 8, 1)).astype(np.float32))
        np.save(folder / "labels.npy", random_.integers(0, 10, 500))
    return folder


def final_state(workdir: Path) -> dict[str, np.ndarray]:
    path = find_checkpoint(workdir)
    leaves = jax.tree_util.tree_leaves_with_path(load_stored(path, stored_tree(path)))
    return {"step": np.int64(path.name)} | {leaf_path(p): np.asarray(v) for p, v in leaves}


def compare(row: Row, workdir: Path, whole: dict[str, np.ndarray]) -> None:
    ours = final_state(workdir)
    different = [k for k in whole if not np.array_equal(whole[k], ours.get(k))]
    if ours.keys() != whole.keys() or different:
        row.failures.append(f"{workdir.name}: {len(different)} arrays differ {different[:3]}")
    losses = [[r["loss"] for r in read_metrics(workdir / "metrics.jsonl")]]
    if len(losses[0]) != STEPS:
        row.failures.append(f"{workdir.name}: {len(losses[0])} rows of metrics, not {STEPS}")


def moment(kind: str, random_: random.Random, start_s: float) -> Callable[[Run], bool]:
    """Whether it is time to end a run: called again and again while it lives."""
    if kind == "while starting":
        after = random_.uniform(0, 0.5) * start_s
        return lambda run: time.monotonic() - run.started > after
    if kind == "between steps":
        ahead = random_.randrange(1, 5 * SAVE_EVERY)
        first: list[int] = []

        def reached(run: Run) -> bool:
            first or first.append(run.step())
            return run.step() >= first[0] + ahead

        return reached
    skip = random_.randrange(3)
    seen: list[bool] = [False]

    def writing(run: Run) -> bool:
        nonlocal skip
        now = run.writing()
        skip -= now and not seen[0]
        seen[0] = now
        if now and skip < 0:
            time.sleep(random_.uniform(0, 0.03))
            return True
        return False

    return writing


def ends(
    row: Row,
    out: Path,
    kinds: list[str],
    number: signal.Signals,
    whole: dict[str, np.ndarray],
    *,
    random_: random.Random,
    start_s: float,
    processes: int = 1,
) -> None:
    """End runs by a signal, once for each of `kinds`, and let them continue to the end."""
    left, chain, inside = list(kinds), 0, 0
    name = row.name.replace(" ", "-").replace(",", "")
    while True:
        workdir = out / f"{name}-{chain}"
        run = Run(workdir, processes)
        if left:
            due = moment(left[0], random_, start_s)
            while run.alive() and not due(run):
                time.sleep(0.002)
            victim = random_.choice(run.processes)
            if run.alive():
                left.pop(0)
                row.ended += 1
                print(f"  {row.name}: {row.ended} at step {run.step()}", flush=True)
                victim.send_signal(number)
        codes = run.wait()
        if number is signal.SIGKILL:
            inside += run.writing()
        expected = {0, 75} if number is signal.SIGTERM else {0, -9}
        if processes == 1 and codes[0] not in expected:
            row.failures.append(f"{workdir.name}: exit code {codes[0]}, see {run.log}")
            return
        if codes == [0] * processes:
            compare(row, workdir, whole)
            if not left:
                break
            chain += 1
    row.notes.append(f"{chain + 1} runs to the end")
    if number is signal.SIGKILL:
        row.notes.append(f"{inside} left a half-written checkpoint")


def refused(row: Row, run: Run, words: str) -> bool:
    """Whether a run ended with one line that has `words`, and code 1."""
    codes = run.wait()
    text = run.log.read_text()
    lines = [x for x in text.splitlines() if x.startswith("main: ")]
    good = codes == [1] and len(lines) == 1 and words in lines[0] and "Traceback" not in text
    if good:
        row.notes.append(lines[0].replace(str(run.workdir), "WORKDIR"))
    else:
        row.failures.append(f"exit codes {codes}, {len(lines)} lines, see {run.log}")
    return good


def full_disk(row: Row, out: Path, whole: dict[str, np.ndarray]) -> None:
    """A small file system of its own; needs the right to mount."""
    workdir = out / "full"
    workdir.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(workdir)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        row.notes.append("NOT RUN: mounting a small file system is not permitted here")
        return
    try:
        if not refused(row, Run(workdir), "No space left on device"):
            return
        row.ended += 1
        verify(find_checkpoint(workdir))
        kept = steps_in(workdir / "checkpoints")[-1]
        subprocess.run(["mount", "-o", "remount,size=500m", str(workdir)], check=True)
        if not (run := Run(workdir)).finished():
            row.failures.append(f"does not continue, see {run.log}")
        elif f"continuing from step {kept}" not in run.log.read_text():
            row.failures.append(f"does not continue from step {kept}, see {run.log}")
        else:
            compare(row, workdir, whole)
    finally:
        subprocess.run(["umount", str(workdir)], check=True)


def damages(step: Path) -> Iterator[tuple[str, Path, Callable[[bytes], bytes]]]:
    """Ways to damage the checkpoint `step`: its largest file, its card, its index."""
    files = [f for f in (step / "state").rglob("*") if f.is_file() and "/d/" in str(f)]
    largest = max(files, key=lambda f: f.stat().st_size)

    def flip(data: bytes) -> bytes:
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]

    yield "truncated", largest, lambda data: data[: len(data) // 2]
    yield "one bit flipped", largest, flip
    yield "one bit flipped", step / "state" / "manifest.ocdbt", flip
    yield "one bit flipped", step / "config" / "metadata", flip
    yield "truncated", step / "SHA256SUMS", lambda data: data[:200]


def damaged(row: Row, out: Path, whole_dir: Path, whole: dict[str, np.ndarray]) -> None:
    """Damage the last checkpoint of a finished run: refused; removed, the run ends as before."""
    for i in range(len(list(damages(find_checkpoint(whole_dir))))):
        workdir = out / f"damaged-{i}"
        shutil.copytree(whole_dir, workdir)
        step = find_checkpoint(workdir)
        before = steps_in(step.parent)[-2]
        how, file, change = list(damages(step))[i]
        file.write_bytes(change(file.read_bytes()))
        row.ended += 1
        if not refused(row, Run(workdir), f"that of step {before} is intact"):
            return
        row.notes[-1] = f"{file.relative_to(step)} {how}: refused"
        shutil.rmtree(step)  # as the line says
        if not (run := Run(workdir)).finished():
            row.failures.append(f"does not continue, see {run.log}")
        compare(row, workdir, whole)


def killed_prepare(row: Row, out: Path, count: int, random_: random.Random) -> None:
    """Kill `prepare` at random moments and compare its cache, byte for byte, with a whole one."""
    pixels = np.random.default_rng(0)
    for i in range(80):
        file = out / "pictures" / f"class{i % 4}" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (64, 64, 3), np.uint8)).save(file)
    config = TAESDConfig(width=8)
    params = jax.tree.map(np.asarray, Autoencoder(config).init(0))
    save_autoencoder(out / "taesd", "taesd", config, params, "float32")

    def start(cache: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "ppflow_jax.prepare", f"--path={out / 'pictures'}"]
        command += [f"--vae=taesd:{out / 'taesd'}", "--size=64", "--batch=2", "--shard_pictures=2"]
        with cache.with_suffix(".log").open("w") as log:
            return subprocess.Popen([*command, f"--out={cache}"], stdout=log, stderr=log)

    def contents(cache: Path) -> dict[str, bytes]:
        files = (f for f in cache.glob("*") if f.is_file() and f.name[0] != ".")
        return {f.name: f.read_bytes() for f in files}

    whole, killed, moments = out / "cache-whole", out / "cache-killed", []
    if start(whole).wait(PATIENCE):
        row.failures.append(f"prepare left alone failed: see {whole.with_suffix('.log')}")
        return
    while row.ended < count:
        process, there = start(killed), len(contents(killed))
        due = there + random_.randrange(4)
        while process.poll() is None and len(contents(killed)) <= due:
            time.sleep(0.001)
        time.sleep(random_.uniform(0, 0.03))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        row.ended += 1
        moments.append(len(contents(killed)))
        print(f"  {row.name}: {row.ended} with {moments[-1]} files there", flush=True)
    if start(killed).wait(PATIENCE):
        row.failures.append(f"does not continue: see {killed.with_suffix('.log')}")
    elif contents(killed) != contents(whole) or row.ended < count:
        row.failures.append(f"{row.ended} kills; the caches differ")
    else:
        row.notes.append(f"{len(contents(whole))} files, the same bytes; killed at {moments}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="parts of the names of the rows to run")
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty")
    args.out.mkdir(parents=True, exist_ok=True)
    random_, rows, begun = random.Random(args.seed), [], time.monotonic()

    def left_alone(processes: int) -> tuple[Path, dict[str, np.ndarray], float]:
        """A run of its own: workdir, final state, seconds until its first step."""
        workdir = args.out / f"whole-{processes}"
        run = Run(workdir, processes, cache=False)
        while run.alive() and not run.step():
            time.sleep(0.05)
        seconds = time.monotonic() - run.started
        if not run.finished():
            raise SystemExit(f"the run left alone failed: see {run.log}")
        total = time.monotonic() - run.started
        print(f"left alone, {processes} process(es): {total:.0f} s", flush=True)
        return workdir, final_state(workdir), seconds

    whole_dir, whole, seconds = left_alone(1)
    two = max(2, args.kills // 5)
    third = (args.kills - two) // 3
    kinds = {
        "while starting": third,
        "between steps": args.kills - two - 2 * third,
        "in a checkpoint write": third,
    }
    one = dict(random_=random_, start_s=seconds)
    todo: list[tuple[str, Callable[[Row], None]]] = []
    for kind, count in kinds.items():
        todo.append(
            (
                f"SIGKILL {kind}",
                lambda row, kind=kind, count=count: ends(
                    row, args.out, [kind] * count, signal.SIGKILL, whole, **one
                ),
            )
        )
    todo += [
        (
            "SIGTERM",
            lambda row: ends(row, args.out, ["between steps"] * 4, signal.SIGTERM, whole, **one),
        ),
        ("disk full during save", lambda row: full_disk(row, args.out, whole)),
        ("SIGKILL in prepare", lambda row: killed_prepare(row, args.out, 5, random_)),
        ("checkpoint damaged", lambda row: damaged(row, args.out, whole_dir, whole)),
    ]

    def both(row: Row, kinds: list[str], number: signal.Signals) -> None:
        if not (args.out / "whole-2").exists():
            both.whole, both.seconds = left_alone(2)[1:]
        timing = dict(random_=random_, start_s=both.seconds)
        ends(row, args.out, kinds, number, both.whole, processes=2, **timing)

    mixed = (["between steps", "in a checkpoint write"] * two)[:two]
    todo += [
        ("SIGKILL one of two processes", lambda row: both(row, mixed, signal.SIGKILL)),
        (
            "SIGTERM one of two processes",
            lambda row: both(row, ["between steps"] * 2, signal.SIGTERM),
        ),
    ]
    for name, scenario in todo:
        if not any(part in name for part in args.only.split(",")):
            continue
        rows.append(Row(name))
        scenario(rows[-1])
        print(f"{name}: {'FAILED' if rows[-1].failures else 'passed'}", flush=True)

    lines = [("what ended the run", "times", "same bits or one line")]
    for row in rows:
        words = "; ".join(row.failures or row.notes)
        lines.append((row.name, str(row.ended), f"{'NO' if row.failures else 'yes'}: {words}"))
    print("\n" + table(lines, left=(0, 2)))
    kills = sum(row.ended for row in rows if "SIGKILL" in row.name)
    print(f"{kills} SIGKILLs in {time.monotonic() - begun:.0f} s")
    return 1 if any(row.failures for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
