"""Runs, caches and samples in an object store that is killed under, fails and refuses.

    python -m tests.acceptance.object_stores --out=DIR [--store=gcs|s3] [--kills=20] [--num=2000]
        [--seed=0] [--only=NAME,...]

A small model is trained on a disk, and then in a bucket of a server on loopback: with SIGKILL at
random moments; through a server that answers every tenth request with 429, 503 or a cut connection;
with a cache that `prepare` wrote into the bucket and was killed at. Samples of it are made there,
killed, and by two processes. Exit code 0 only if every final state and every file of samples and
caches has the bits of the disk, and a missing bucket, a lost permission and a full quota end in one
line before anything is compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from ppflow_jax.autoencoders.autoencoder import Autoencoder
from ppflow_jax.autoencoders.decode import save_autoencoder
from ppflow_jax.autoencoders.taesd import TAESDConfig
from ppflow_jax.console import table
from ppflow_jax.files.place import place
from ppflow_jax.train.metrics_log import read_metrics
from tests import buckets
from tests.acceptance.faulty_store import Faults, faulty
from tests.acceptance.kill_resume import final_state

STEPS = 60
TRAIN = [
    *("main", "--config=configs/digits.py", "--config.data.source=arrays"),
    *("--config.model.width=32", "--config.model.depth=1", "--config.model.heads=2"),
    *("--config.data.batch_size=16", f"--config.train.steps={STEPS}"),
    *("--config.train.save_every=6", "--config.train.log_every=1", "--config.sample.every=0"),
    *("--config.sample.count=2", "--config.sample.steps=2"),
]


@dataclass
class Scene:
    """Where everything is, and what was found.

    Attributes:
      bucket: its address.
      environment: of the commands.
      faults: of the server between, only for gcs.
      rows: of the table: name, times, result.
    """

    out: Path
    bucket: str
    environment: dict[str, str]
    faults: Faults | None
    random: random.Random
    seconds: float = 0.0  # of a run on the disk
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    failed: bool = False

    def start(self, log: str, *command: str, **environment: str) -> subprocess.Popen:
        with (self.out / f"{log}.log").open("a") as file:
            return subprocess.Popen(
                [sys.executable, "-m", f"ppflow_jax.{command[0]}", *command[1:]],
                env=self.environment | environment,
                stdout=file,
                stderr=file,
            )

    def run(self, log: str, *command: str, **environment: str) -> int:
        return self.start(log, *command, **environment).wait(1200)

    def log(self, name: str) -> str:
        return (self.out / f"{name}.log").read_text()

    def row(self, name: str, times: object, good: bool, text: str) -> None:
        self.rows.append((name, str(times), text if good else f"FAILED: {text}"))
        self.failed |= not good
        print(f"{name}: {times}: {self.rows[-1][2]}", flush=True)


def killed(scene: Scene, log: str, kills: int, longest: float, *command: str) -> tuple[int, int]:
    """Run a command again and again, killed `kills` times after random seconds; kills, exit code.

    One that ends before it is killed ends it all.
    """
    done = 0
    while done < kills:
        process = scene.start(log, *command)
        try:
            return done, process.wait(scene.random.uniform(0.4 * longest, longest))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
    return done, scene.run(log, *command)


def same_run(scene: Scene, workdir: str) -> str:
    """What differs from the run on the disk; nothing if all bits are equal."""
    whole, ours = final_state(scene.out / "disk"), final_state(place(workdir))
    different = [k for k in whole if not np.array_equal(whole[k], ours.get(k))]
    rows = [
        [{k: v for k, v in row.items() if k != "images_per_s"} for row in read_metrics(path)]
        for path in (scene.out / "disk" / "metrics.jsonl", place(workdir) / "metrics.jsonl")
    ]
    if len(rows[0]) != STEPS or rows[0] != rows[1]:
        different.append("metrics.jsonl")
    return ", ".join(different)


def train_killed(scene: Scene, kills: int) -> None:
    longest, total, number = scene.seconds * 1.2, 0, 0
    while total < kills:
        workdir = f"{scene.bucket}/killed-{number}"
        done, code = killed(
            scene, f"killed-{number}", kills - total, longest, *TRAIN, f"--workdir={workdir}"
        )
        total, number = total + done, number + 1
        if code or (differs := same_run(scene, workdir)):
            text = f"exit code {code}" if code else f"differs in {differs}"
            scene.row("train, SIGKILL", total, False, f"{workdir}: {text}")
            return
    log = "".join(scene.log(f"killed-{i}") for i in range(number))
    steps = sorted(int(s) for s in re.findall(r"continuing from step (\d+)", log))
    scene.row("train, SIGKILL", total, True, f"{number} runs, same bits; continued from {steps}")


def train_two(scene: Scene, kills: int) -> None:
    """Two processes, one of which is killed, against two on a disk."""
    if scene.faults is None:  # s3 refuses several processes
        return
    disk, store = str(scene.out / "disk-two"), f"{scene.bucket}/two"
    if both(scene, "disk-two", *TRAIN, f"--workdir={disk}"):
        scene.row("train, two processes", 0, False, "on the disk")
        return
    begun, done = time.monotonic(), 0
    for _ in range(kills):
        first = place(store) / "checkpoints" / f"{6 * (done + 1)}" / "SHA256SUMS"
        processes = started(scene, "two", *TRAIN, f"--workdir={store}")
        while all(p.poll() is None for p in processes) and not first.is_file():
            time.sleep(0.1)
        time.sleep(scene.random.uniform(0, 1))
        done += processes[1].poll() is None
        processes[1].kill()
        for p in processes:
            p.wait(600)
    code = both(scene, "two", *TRAIN, f"--workdir={store}")
    whole, ours = (final_state(place(path)) for path in (disk, store)) if not code else ({}, {})
    different = [k for k in whole if not np.array_equal(whole[k], ours.get(k))]
    good = not code and not different and done == kills
    text = f"exit code {code}, different: {different}, {time.monotonic() - begun:.0f} s"
    scene.row("train, one of two processes killed", done, good, "same bits" if good else text)


def started(scene: Scene, log: str, *command: str) -> list[subprocess.Popen]:
    """A command in two processes."""
    port = buckets.free_port()
    return [
        scene.start(
            f"{log}-{k}",
            *command,
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(k),
        )
        for k in range(2)
    ]


def both(scene: Scene, log: str, *command: str) -> int:
    """Its exit code."""
    return max(abs(p.wait(1200)) for p in started(scene, log, *command))


def train_faulty(scene: Scene) -> None:
    if scene.faults is None:
        return
    workdir, scene.faults.share = f"{scene.bucket}/faulty", 0.1
    scene.faults.made.clear()
    code = scene.run("faulty", *TRAIN, f"--workdir={workdir}")
    scene.faults.share = 0.0
    made, log = dict(scene.faults.made), scene.log("faulty")
    said = re.search(r"asked the object store again (\d+) times", log)
    good = code == 0 and not same_run(scene, workdir) and bool(said)
    text = f"{made}, said: {said[0] if said else 'NOTHING'}"
    scene.row("train, 10% of requests fail", sum(made.values()), good, text if good else log[-500:])


def sampled(scene: Scene, num: int) -> None:
    args = ["sample", f"--checkpoint={scene.out / 'disk'}", f"--num={num}", "--steps=10"]
    args += ["--solver=euler", "--cfg=1,2", "--save_latents", "--nopngs"]
    if scene.run("samples", *args, f"--out={scene.out / 'samples'}"):
        scene.row("sample", 0, False, "on the disk")
        return
    args[1] = f"--checkpoint={scene.bucket}/killed-0"
    out = f"{scene.bucket}/samples-killed"
    done = code = 0
    total = -(-num // 256)
    for part in range(3):  # after so many shards
        process, due = scene.start("samples-killed", *args, f"--out={out}"), (part + 1) * total // 4
        while process.poll() is None and _shards(out) < due:
            time.sleep(0.02)
        done += process.poll() is None
        process.kill()
        process.wait()
    code = scene.run("samples-killed", *args, f"--out={out}")
    if not code and done < 3:
        code = "too few kills"
    _same_samples(scene, "sample, SIGKILL", done, out, code)
    out = f"{scene.bucket}/samples-two"
    code = both(scene, "samples-two", *args, f"--out={out}")
    _same_samples(scene, "sample, two processes", 2, out, code)


def _shards(out: str) -> int:
    names = [path.stem for path in (place(out) / "shards").iterdir()]
    return sum(name.isdecimal() for name in names)


def _same_samples(scene: Scene, name: str, times: int, out: str, code: object) -> None:
    files = ("samples.npz", "latents.npy", "labels.npy", "grid.png")
    different = [
        f
        for f in (files if not code else ())
        if (place(out) / f).read_bytes() != (scene.out / "samples" / f).read_bytes()
    ]
    text = f"exit code {code}, different: {different}" if code or different else "equal to the byte"
    scene.row(name, times, not code and not different, text)


def prepared(scene: Scene, kills: int) -> None:
    pixels = np.random.default_rng(0)
    for i in range(60):
        file = scene.out / "pictures" / f"class{i % 4}" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (64, 64, 3), np.uint8)).save(file)
        (place(scene.bucket) / "pictures" / file.parent.name / file.name).upload(file)
    config = TAESDConfig(width=8)
    params = jax.tree.map(np.asarray, Autoencoder(config).init(0))
    save_autoencoder(scene.out / "taesd", "taesd", config, params, "float32")
    args = ["--size=64", "--batch=2", "--shard_pictures=4"]
    disk = f"--path={scene.out / 'pictures'}", f"--vae=taesd:{scene.out / 'taesd'}"
    save_autoencoder(f"{scene.bucket}/taesd", "taesd", config, params, "float32")
    store = f"--path={scene.bucket}/pictures", f"--vae=taesd:{scene.bucket}/taesd"
    begun = time.monotonic()
    scene.run("prepare", "prepare", *args, *disk, f"--out={scene.out / 'cache'}")
    seconds = time.monotonic() - begun
    cache = f"{scene.bucket}/cache"
    done, code = killed(
        scene, "prepare-killed", kills, seconds, "prepare", *args, *store, f"--out={cache}"
    )
    shards = sorted((scene.out / "cache").glob("*.array_record"))
    different = (
        [f.name for f in shards if (place(cache) / f.name).read_bytes() != f.read_bytes()]
        if not code
        else ["exit code"]
    )
    code = code or scene.run("prepare-verify", "prepare", f"--out={cache}", "--verify")
    good = not code and not different and len(shards) == 15
    scene.row("prepare, SIGKILL", done, good, f"{len(shards)} shards, different: {different}")
    latents = ["--config.data.source=cache", "--config.data.space=latents"]
    latents += ["--config.model.channels=4", "--config.eval.every=0", "--config.train.steps=12"]
    runs = {
        "disk": (str(scene.out / "on-disk"), str(scene.out / "cache"), ""),
        "ranges": (f"{scene.bucket}/on-ranges", cache, ""),
        "staged": (f"{scene.bucket}/on-staged", cache, str(scene.out / "stage")),
    }
    states = {}
    for name, (workdir, data, stage) in runs.items():
        where = [f"--workdir={workdir}", f"--config.data.path={data}"]
        where += [f"--config.data.stage={stage}"]
        if scene.run(f"cache-{name}", *TRAIN, *latents, *where):
            scene.row(f"train on a cache, {name}", 1, False, scene.log(f"cache-{name}")[-500:])
            return
        states[name] = final_state(place(workdir))
    equal = all(
        np.array_equal(states["disk"][k], states[n][k]) for n in runs for k in states["disk"]
    )
    scene.row("train on a cache, by ranges and staged", 2, equal, "same bits")


def refused(scene: Scene) -> None:
    """One line each, and no bar of training, which is there before the first step compiles."""
    cases: list[tuple[str, str, str, str]] = [
        ("missing bucket", scene.bucket.replace("bucket", "missing"), "bucket does not exist", ""),
        ("unknown scheme", "hdfs://host/run", "not supported", ""),
    ]
    if scene.faults is not None:
        cases += [
            ("no permission", f"{scene.bucket}/refused", "no permission", "permission"),
            ("full quota", f"{scene.bucket}/full", "quota of the object store is full", "quota"),
        ]
    for name, workdir, words, refuse in cases:
        if scene.faults is not None:
            scene.faults.refuse = refuse
        log = f"refused-{name.replace(' ', '-')}"
        code = scene.run(log, *TRAIN, f"--workdir={workdir}")
        text = scene.log(log)
        good = code == 1 and text.strip().count("\n") == 0 and words in text
        scene.row(name, 1, good, text.strip()[-300:])
    if scene.faults is None:
        return
    scene.faults.refuse = ""
    workdir, log = f"{scene.bucket}/lost", "lost"
    process = scene.start(log, *TRAIN, f"--workdir={workdir}")
    first = place(workdir) / "checkpoints" / "6" / "SHA256SUMS"
    while process.poll() is None and not first.is_file():
        time.sleep(0.05)
    scene.faults.refuse = "quota"
    code = process.wait(600)
    scene.faults.refuse = ""
    lines = [line for line in scene.log(log).splitlines() if line.startswith("main: ")]
    good = code == 1 and len(lines) == 1 and "Traceback" not in scene.log(log)
    good &= bool(lines) and "is good" in lines[0] and "quota" in lines[0]
    scene.row("quota full while training", 1, good, "; ".join(lines))
    code = scene.run(log, *TRAIN, f"--workdir={workdir}")
    differs = "exit code" if code else same_run(scene, workdir)
    scene.row("continued after that", 1, not differs, differs or "same bits")


def scenario(args: argparse.Namespace, bucket: str, env: dict[str, str], faults) -> int:
    os.environ.update(env)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(args.out / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    scene = Scene(args.out, bucket, environment, faults, random.Random(args.seed))
    data = args.out / "data"
    data.mkdir()
    values = np.random.default_rng(0)
    np.save(data / "latents.npy", values.normal(size=(500, 8, 8, 1)).astype(np.float32))
    np.save(data / "labels.npy", values.integers(0, 10, 500))
    for file in data.iterdir():
        (place(bucket) / "data" / file.name).upload(file)
    TRAIN.append(f"--config.data.path={bucket}/data")
    for _ in range(2):  # the second is timed: it compiles nothing
        shutil.rmtree(args.out / "disk", ignore_errors=True)
        begun = time.monotonic()
        if scene.run("disk", *TRAIN, f"--workdir={args.out / 'disk'}"):
            raise SystemExit(f"the run on the disk failed: {scene.log('disk')[-500:]}")
        scene.seconds = time.monotonic() - begun
    print(f"on the disk: {scene.seconds:.0f} s", flush=True)
    todo: dict[str, Callable[[], None]] = {
        "train": lambda: train_killed(scene, args.kills),
        "two": lambda: train_two(scene, 2),
        "faulty": lambda: train_faulty(scene),
        "sample": lambda: sampled(scene, args.num),
        "prepare": lambda: prepared(scene, 3),
        "refused": lambda: refused(scene),
    }
    for name, part in todo.items():
        if not args.only or name in args.only.split(","):
            part()
    print(table([("what", "times", "result"), *scene.rows], left=(0, 2)))
    (args.out / "rows.json").write_text(json.dumps(scene.rows, indent=1))
    return int(scene.failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--store", choices=["gcs", "s3"], default="gcs")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    args.out = args.out.absolute()
    args.out.mkdir(parents=True)
    if args.store == "s3":
        with buckets.s3() as env:
            return scenario(args, f"s3://{buckets.BUCKET}", env, None)
    store, port = buckets.free_port(), buckets.free_port()
    with faulty(store, port) as faults:
        with buckets.gcs(port=store, reached_at=f"http://127.0.0.1:{port}") as env:
            return scenario(args, f"gs://{buckets.BUCKET}", env, faults)


if __name__ == "__main__":
    sys.exit(main())
