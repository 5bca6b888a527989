"""The first hour of a new user: python -m tests.acceptance.newcomer DIR

Builds a wheel, installs it in a virtual environment of its own in the new folder DIR, and from
there runs every command of README on a small scale, its Python, the notebook, and then what goes
wrong in a first hour. Nothing of the checkout is on the path. Exit code 1 if a command fails, a
help takes two seconds, or a mistake ends in anything but one clear line.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

from tests.commands import ROOT

PICTURES = """
from pathlib import Path
from PIL import Image
from sklearn.datasets import load_digits
digits = load_digits()
for k, (x, y) in enumerate(zip(digits.images, digits.target)):
    folder = Path(f"pictures/digit{y}")
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray((x * 15.9).astype("uint8")).convert("RGB").save(folder / f"{k:04}.png")
"""
API = """
import ppflow_jax as pf
model = pf.load("weights/rgb")
assert model.config.channels == 3
model = pf.load("runs/fine")
plan = model.plan(steps=6, cfg=(1, 3))
print(plan.explain(batch=4))
assert model.sample(4, plan=plan, seed=0).pictures.shape == (4, 8, 8, 3)
"""
TRAIN = ["train", "--config=digits", "--config.data.source=folder", "--config.data.path=pictures"]
TRAIN += ["--config.data.batch_size=32", "--config.train.steps=4", "--config.sample.count=4"]
SIT = ["--config.model.channels=3", "--config.model.pyramid=2x2@1", "--workdir=runs/sit"]
TUNE = ["tune", "--checkpoint=runs/fine", "--cfg=1,3", "--noises=8"]
HOUR = [
    ["--help"],
    ["--version"],
    [*TRAIN, *SIT],
    [*TRAIN, *SIT],  # again: nothing to do
    ["convert", "--source=runs/sit", "--to=torch", "--target=rgb.pt"],
    ["convert", "--source=rgb.pt", "--pyramid=4x4@0.5,2x2@1", "--heads=4", "--target=weights/rgb"],
    [*TRAIN, "--config.init_from=weights/rgb", "--workdir=runs/fine"],
    ["sample", "--checkpoint=runs/fine", "--out=samples", "--num=8", "--cfg=1,3", "--steps=6"],
    ["sample", "--checkpoint=runs/fine", "--out=samples", "--num=16", "--cfg=1,3", "--steps=6"],
    ["sample", "--checkpoint=runs/fine", "--cfg=1,3", "--steps=6", "--explain"],
    ["sample", "--checkpoint=runs/fine", "--out=fast", "--num=8", "--accelerate=balanced"],
    [*TUNE, "--evaluations=4", "--out=runs/fine/plan.json"],
    [*TUNE, "--forecast=branch", "--steps=6", "--full=3", "--out=forecasts.json"],
    ["tune", "--data=digits"],
    ["sample", "--checkpoint=runs/fine", "--out=tuned", "--num=8", "--accelerate=auto"],
    ["sample", "--checkpoint=runs/fine", "--out=forecast", "--num=8", "--plan=forecasts.json"],
    ["sample", "--checkpoint=runs/fine", "--out=asked", "--requests=asked.jsonl", "--steps=6"],
    ["convert", "--source=runs/fine", "--to=torch", "--target=fine.pt"],
    ["report", "runs/sit", "runs/fine", "--out=report.html"],
    ["train", "--config=digits", "--workdir=runs/digits", "--config.train.steps=4"],
    ["evaluate", "--reference=digits", "--train_features=weights/features"],
    ["evaluate", "--checkpoint=runs/digits", "--num=64", "--reference=digits",
     "--features=weights/features"],
    ["bench", "--size=S", "--work=sample", "--batch=2", "--steps=3", "--rounds=1"],
]  # fmt: skip
SAMPLE = ["sample", "--checkpoint=runs/fine", "--out=wrong"]
WRONG = [
    (["tarin"], "train"),
    (["sample"], "--checkpoint is required"),
    (["sample", "runs/fine"], "--name=value"),
    (["sample", "--checkpoint=runs/fine"], "--out is required"),
    (["sample", "--checkpoint=runs/fien", "--out=wrong"], "runs/fien"),
    (["sample", "--checkpoint=pictures", "--out=wrong"], "no checkpoint"),
    (["sample", "--checkpoint=rgb.pt", "--out=wrong"], "convert|--heads"),
    ([*SAMPLE, "--steps=0"], "steps"),
    ([*SAMPLE, "--steps=many"], "steps"),
    ([*SAMPLE, "--step=4"], "--steps|unknown|Unknown"),
    ([*SAMPLE, "--num=0"], "at least 1"),
    ([*SAMPLE, "--num=1000000000000"], "GB"),
    ([*SAMPLE, "--cfg=1,2,3"], "scale"),
    ([*SAMPLE, "--cfg=a"], "cfg"),
    ([*SAMPLE, "--cfg=nan"], "finite"),
    ([*SAMPLE, "--solver=ddpm"], "solver"),
    ([*SAMPLE, "--labels=dog"], "digit0"),
    ([*SAMPLE, "--labels=99"], "classes 0 to 9"),
    ([*SAMPLE, "--seed=-1"], "0 to"),
    ([*SAMPLE, "--noise=asked.jsonl"], "npy"),
    ([*SAMPLE, "--noise=none.npy"], "none.npy"),
    ([*SAMPLE, "--decode=vae:weights/vae"], "vae"),
    ([*SAMPLE, "--decode=vae"], "vae:DIR"),
    ([*SAMPLE, "--accelerate=turbo"], "balanced"),
    ([*SAMPLE, "--weights=best"], "ema"),
    ([*SAMPLE, "--dtype=float16"], "bfloat16"),
    ([*SAMPLE, "--requests=pictures"], "requests"),
    ([*SAMPLE, "--requests=wrong.jsonl"], "line 2"),
    ([*SAMPLE, "--requests=asked.jsonl", "--num=4"], "leave out --num"),
    ([*SAMPLE, "--weak=runs/nothing"], "runs/nothing"),
    (["sample", "--checkpoint=runs/fine", "--out=samples", "--num=16", "--steps=9"], "steps"),
    (["sample", "--checkpoint=runs/fine", "--out=rgb.pt", "--num=4"], "rgb.pt"),
    (["sample", "--checkpoint=runs/fine", "--out=s3://bucket/x", "--num=4"], "s3://"),
    ([*SAMPLE, "--plan=none.json"], "none.json"),
    ([*SAMPLE, "--plan=wrong.jsonl"], "ppflow tune"),
    ([*SAMPLE, "--plan=runs/fine/plan.json", "--steps=6"], "--plan decides --steps"),
    (["sample", "--checkpoint=runs/sit", "--out=w", "--plan=forecasts.json"], "another pyramid"),
    (["tune"], "--checkpoint"),
    (["tune", "--checkpoint=runs/fine"], "give one budget"),
    ([*TUNE, "--evaluations=1"], "less than one step"),
    ([*TUNE, "--evaluations=4", "--out=runs"], "is a folder"),
    ([*TUNE, "--forecast=branch", "--steps=6"], "--full"),
    ([*TUNE, "--forecast=attention", "--steps=6", "--full=3"], "branch"),
    (["tune", "--data=nothing"], "nothing"),
    (["train"], "--config"),
    (["train", "--config=digits"], "--workdir"),
    (["train", "--config=digit", "--workdir=runs/x"], "digits"),
    (["train", "--config=none.py", "--workdir=runs/x"], "none.py"),
    (["train", "--config=digits", "--workdir=runs/x", "--config.optim.rl=1"], "optim"),
    (["train", "--config=digits", "--workdir=runs/x", "--config.train.steps=x"], "steps"),
    (["train", "--config=digits", "--workdir=runs/x", "--config.data.path=pictures",
      "--config.data.source=folder"], "channels"),
    (["train", "--config=digits", "--workdir=runs/x", "--config.data.path=nothing",
      "--config.data.source=folder"], "nothing"),
    (["train", "--config=digits", "--workdir=runs/x", "--config.model.pyramid=3x3@1"], "3"),
    (["train", "--config=digits", "--workdir=runs/fine"], "differ|another|changed|->"),
    (["train", "--config=digits", "--workdir=rgb.pt"], "rgb.pt"),
    (["train", "--config=ppflow_b2", "--workdir=runs/x"], "config.data"),
    (["train", "--config=digits", "--workdir=runs/x", "--config.init_from=rgb.pt"], "convert"),
    (["convert", "--source=rgb.pt"], "--target"),
    (["convert", "--source=none.pt", "--target=w"], "none.pt"),
    (["convert", "--source=rgb.pt", "--target=w"], "--heads"),
    (["convert", "--source=asked.jsonl", "--target=w"], "asked.jsonl"),
    (["convert", "--source=rgb.pt", "--target=weights/rgb", "--heads=4"], "weights/rgb"),
    (["convert", "--source=rgb.pt", "--target=w", "--heads=3"], "heads"),
    (["convert", "--source=rgb.pt", "--target=w", "--heads=4", "--pyramid=ppflow9"], "pyramid"),
    (["convert", "--source=runs/fine", "--to=onnx", "--target=x"], "torch"),
    (["convert", "--source=runs/fine", "--to=torch", "--target=fine.pt"], "fine.pt"),
    (["evaluate", "--samples=samples/samples.npz"], "--reference"),
    (["evaluate", "--samples=samples", "--reference=pictures"], "--features"),
    (["evaluate", "--samples=samples", "--reference=pictures", "--features=nothing"], "nothing"),
    (["evaluate", "--samples=none.npz", "--reference=digits", "--features=digits"], "none.npz"),
    (["evaluate", "--samples=samples", "--reference=pictures", "--features=weights/features",
      "--metrics=clip"], "fid"),
    (["evaluate", "--checkpoint=runs/fine", "--reference=digits", "--num=9",
      "--features=weights/features", "--metrics=sfid"], "sfid"),
    (["prepare", "--path=pictures", "--out=cache"], "--vae"),
    (["prepare", "--path=pictures", "--out=cache", "--vae=vae:nothing"], "nothing"),
    (["report"], "give"),
    (["report", "runs/nothing", "--out=r.html"], "runs/nothing"),
    (["bench", "--size=XXL"], "size"),
    (["serve", "--checkpoint=runs/fine"], r"ppflow_jax\[serve\]"),
]  # fmt: skip
WRONG_API = """
import re
import numpy as np
import ppflow_jax as pf
model = pf.load("runs/fine")
x = np.zeros((2, 8, 8, 3), np.float32)
calls = {
    "no folder": lambda: pf.load("runs/nothing"),
    "heads": lambda: pf.load("rgb.pt"),
    "scales": lambda: model.plan(cfg=(1, 2, 3)),
    "steps": lambda: model.plan(steps=0),
    "solver": lambda: model.plan(solver="ddpm"),
    "name": lambda: model.sample(2, labels="dog"),
    "class": lambda: model.sample(2, labels=10**9),
    "seed": lambda: model.sample(2, seed=-1),
    "noise": lambda: model.sample(noise=x.transpose(0, 3, 1, 2)),
    "time": lambda: model(x, 2.0, 1),
    "plan": lambda: model.sample(2, plan="fast"),
    "decode": lambda: model.sample(2, decode="vae"),
}
for name, call in calls.items():
    try:
        call()
    except pf.InputError as error:
        assert len(str(error)) > 20, (name, error)
    else:
        raise SystemExit(f"{name} was taken")
print(len(calls), "wrong calls")
"""


def main(folder: Path) -> int:
    folder.mkdir(parents=True)
    started = time.monotonic()
    wheels = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), "."]
    subprocess.run(wheels, cwd=ROOT, check=True)
    venv.create(folder / "venv", with_pip=True)
    bin_ = folder / "venv/bin"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([bin_ / "pip", "install", "-q", wheel], check=True)
    print(f"installed in {time.monotonic() - started:.0f} s", flush=True)
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    kept |= {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}

    def call(*args, cwd=folder):
        start = time.monotonic()
        done = subprocess.run(args, cwd=cwd, env=kept, capture_output=True, text=True)
        return done, time.monotonic() - start

    problems = []

    def expect(holds: bool, what: str) -> None:
        print("ok " if holds else "BAD", what, flush=True)
        if not holds:
            problems.append(what)

    for command in "train sample evaluate convert prepare serve report bench".split():
        done, seconds = call(bin_ / "ppflow", command, "--help")
        expect(done.returncode == 0 and seconds < 2, f"{command} --help: {seconds:.2f} s")
    call(bin_ / "python", "-c", PICTURES)
    lines = [{"label": "digit3", "seed": 7, "guidance": [1, 3]}, {"label": 8}]
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "wrong.jsonl").write_text('{"label": 1}\n{"label": 77}\n')
    for args in HOUR:
        done, seconds = call(bin_ / "ppflow", *args)
        last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1][:100]
        expect(done.returncode == 0, f"{' '.join(args)[:90]}: {seconds:.0f} s: {last}")
    notebook = json.loads((ROOT / "examples/quickstart.ipynb").read_text())
    code = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    scripts = {"API": API, "notebook": "\n\n".join(code), "wrong calls": WRONG_API}
    for name, text in scripts.items():
        here = folder / "examples" if name == "notebook" else folder
        here.mkdir(exist_ok=True)
        (here / "script.py").write_text(text)
        done, seconds = call(bin_ / "python", "script.py", cwd=here)
        expect(done.returncode == 0, f"{name}: {seconds:.0f} s {done.stderr[-300:]}")
    for args, says in WRONG:
        done, _ = call(bin_ / "ppflow", *args)
        said = [line for line in done.stderr.splitlines() if "it/s" not in line]
        line = said[-1] if said else ""
        holds = done.returncode in (1, 2) and "Traceback" not in done.stderr
        holds = holds and bool(re.search(says, line))
        expect(holds, f"{' '.join(args)[:70]} -> {done.returncode} {line[:400]}")
    print(f"{len(HOUR)} commands, {len(WRONG)} mistakes, {len(problems)} problems")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute()))
