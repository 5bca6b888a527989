"""Few evaluations by training: MeanFlow, and students of a guided model, against their teacher.

    python -m benchmarks.few_steps --out=DIR --features=FEATURES [--seeds=3] [--train_steps=600] \
        [--batch_size=256] [--num=1024] [--rounds=7] [--docs=FILE.md]

Trains on digits, for SiT and for two levels and every seed: the model of configs/digits.py, which
is the teacher; MeanFlow; the guided student; and rounds of halved steps from it. Each run has
--train_steps steps, so that a student has seen twice as many pictures as its teacher, and so on.
The teacher is also sampled by plans that `tune` fits to it. All are judged by FID in FEATURES (as
of `evaluate`), of the same noise and labels. Times are of a batch of 64, all rows in turn in every
round, as medians of the ratio to the teacher's Euler steps of the same pyramid under guidance by
two evaluations. Runs and rows that are in DIR are kept: the same command continues where it
stopped, and --seeds may grow. Leaves rows.json and table.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

import ppflow_jax as pf
from benchmarks.fast_sampling import timed
from benchmarks.settings import spread, tuned_plan
from configs import digits, digits_few_steps
from ppflow_jax.data.images import array_images
from ppflow_jax.devices.host_memory import keep_scratch
from ppflow_jax.files.disk import atomic
from ppflow_jax.flow.sampler import image_noise
from ppflow_jax.generate.plan import Plan
from ppflow_jax.metrics.evaluator import Evaluator, open_reference
from ppflow_jax.metrics.networks import load_features
from ppflow_jax.train.loop import train

PYRAMIDS = {"SiT": "sit", "2 levels": ""}
STEPS, CFG, BATCH = 20, 2.0, 64
FEWER = (8, 4, 2)  # of the teacher, of the guided student, and rounds of halved steps
TUNED = (8, 5)
JUMPS = (1, 2, 4)


class Setting(NamedTuple):
    """A row: a run, and how it is sampled; `tuned`: evaluations of a plan fitted to it."""

    run: str
    name: str
    plan: dict[str, Any]
    tuned: int = 0


def settings() -> Iterator[Setting]:
    guided = {"solver": "euler", "cfg": CFG}
    for steps in (STEPS, *FEWER):
        yield Setting("teacher", f"Euler {steps}, two evaluations", guided | {"steps": steps})
        yield Setting("guided", f"guided student, Euler {steps}", guided | {"steps": steps})
    for steps in TUNED:
        name = f"tuned plan of {steps} steps, two evaluations"
        yield Setting("teacher", name, {"cfg": CFG}, tuned=steps)
    for steps in FEWER:
        name = f"halved to {steps} steps"
        yield Setting(f"halved{steps}", name, guided | {"steps": steps})
    for steps in JUMPS:
        yield Setting("meanflow", f"MeanFlow {steps}", {"solver": "meanflow", "steps": steps})


BASE = next(settings()).name


def configurations(folder: Path, pyramid: str, seed: int, args: Any) -> dict[str, ConfigDict]:
    """Every run of a pyramid and a seed, in the order in which they need each other."""

    def few(name: str, teacher: str) -> ConfigDict:
        config = digits_few_steps.get_config(f"{name},{pyramid}")
        config.train.teacher = teacher and str(folder / teacher)
        return config

    found = {"teacher": digits.get_config(pyramid), "meanflow": few("meanflow", "")}
    found["guided"], before = few("guided", "teacher"), "guided"
    for count in FEWER:
        name = f"halved{count}"
        found[name] = few("halved", before)
        found[name].flow.objective = f"halved:steps={count},low=1,high=4"
        found[name].sample.steps, before = count, name
    for config in found.values():
        config.seed, config.train.steps, config.sample.every = seed, args.train_steps, 0
        config.data.batch_size = args.batch_size
    return found


def trained(out: Path, pyramid: str, seed: int, args: Any) -> Path:
    """The folder of the runs of a pyramid and a seed, all of them trained."""
    folder, steps = out / str(seed) / (pyramid or "levels2"), args.train_steps
    for name, config in configurations(folder, pyramid, seed, args).items():
        if not (folder / name / "checkpoints" / str(steps)).exists():
            print(f"seed {seed}, {pyramid or '2 levels'}, {name}: {steps} steps", flush=True)
            train(config, str(folder / name))
    return folder


def planned(folder: Path, setting: Setting) -> tuple[Any, Plan]:
    model = pf.load(folder / setting.run)
    if not setting.tuned:
        return model, model.plan(**setting.plan)
    file = folder / f"tuned{setting.tuned}.json"
    return model, tuned_plan(model, file, (CFG,), setting.tuned, noises=256)


def judged(folder: Path, setting: Setting, evaluator: Evaluator, num: int) -> dict[str, float]:
    model, plan = planned(folder, setting)
    pictures = model.sample(num, plan=plan, seed=0, microbatch=BATCH).pictures
    fid = evaluator(array_images(f"{num} of {setting.name}", pictures))["metrics"]["fid"]
    return {"fid": float(fid), "nfe": plan.nfe}


def times(folder: Path, rounds: int) -> dict[str, float]:
    """Time of every row, as a share of the first's."""
    runs = {}
    for setting in settings():
        model, plan = planned(folder, setting)
        noise = image_noise(0, np.arange(BATCH), model.config.shape)[0]
        labels = np.arange(BATCH, dtype=np.int32) % model.config.num_classes
        sampler = plan.sampler()
        runs[setting.name] = lambda s=sampler, p=model.params, x=noise, y=labels: s(p, x, y)
    return timed(runs, BASE, rounds)


def table(rows: dict[str, dict], shares: dict[str, dict[str, float]], args: Any) -> str:
    """FID (mean and range over seeds) and time of every row."""
    lines = [
        f"`python -m benchmarks.few_steps --seeds={args.seeds} --train_steps={args.train_steps} "
        f"--batch_size={args.batch_size} --num={args.num}`: digits, FID of {args.num} samples "
        f"under a guidance of {CFG:g} in the features of --features, mean "
        f"(range over {args.seeds} training seeds); time at batch {BATCH} "
        f"as a share of {BASE} of the same pyramid.",
        "",
        "| model | sampled by | evaluations | time | FID |",
        "|---|---|---|---|---|",
    ]
    for title in PYRAMIDS:
        for setting in settings():
            found = [rows[f"{seed} | {title} | {setting.name}"] for seed in range(args.seeds)]
            fid = spread([row["fid"] for row in found], ".2f")
            passes = found[0]["nfe"] * (2 if setting.run == "teacher" else 1)
            share = shares[title][setting.name]
            lines.append(f"| {title} | {setting.name} | {passes} | {share:.3f} | {fid} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--features", required=True)
    parser.add_argument("--reference", default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train_steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--num", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--docs", type=Path)
    args = parser.parse_args()
    keep_scratch()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    evaluator = Evaluator(
        load_features(args.features, "tf1"), open_reference(args.reference, None), ("fid",)
    )
    store = out / "rows.json"
    rows = json.loads(store.read_text()) if store.exists() else {}
    folders = {}
    for seed in range(args.seeds):
        for title, pyramid in PYRAMIDS.items():
            folders[seed, title] = trained(out, pyramid, seed, args)
            for setting in settings():
                key = f"{seed} | {title} | {setting.name}"
                if key not in rows:
                    rows[key] = judged(folders[seed, title], setting, evaluator, args.num)
                    with atomic(store) as temporary:
                        temporary.write_text(json.dumps(rows, indent=1))
                print(f"{key}: {rows[key]}", flush=True)
    shares = {title: times(folders[0, title], args.rounds) for title in PYRAMIDS}
    text = table(rows, shares, args)
    print(text)
    (out / "table.md").write_text(text)
    if args.docs:
        args.docs.write_text(f"# Few evaluations, measured\n\n{text}")


if __name__ == "__main__":
    main()
