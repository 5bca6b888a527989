"""Wrong calls of the API: python -m tests.api.wrong_calls RUN

Apart from the tests, whose run-time type checks would answer in the place of the library.
"""

from __future__ import annotations

import re
import sys

import numpy as np

import ppflow_jax as pf

X = np.zeros((2, 8, 8, 1), np.float32)
WRONG = {
    "no such folder": (lambda m: pf.load("/nowhere/at/all"), "no checkpoint"),
    "a bucket": (lambda m: pf.load("gs://b/run"), "gs://"),
    "weights": (lambda m: pf.load("x", weights="best"), "ema or params"),
    "dtype": (lambda m: pf.load("x", dtype="fp8"), "float32 or bfloat16"),
    "steps 0": (lambda m: m.plan(steps=0), "at least 1"),
    "steps 1": (lambda m: m.plan(steps=1), "at least 2"),
    "steps 2.5": (lambda m: m.plan(steps=2.5), "whole number"),
    "steps True": (lambda m: m.plan(steps=True), "whole number"),
    "three scales": (lambda m: m.plan(cfg=(1, 2, 3)), "3 guidance scales"),
    "scale of text": (lambda m: m.plan(cfg="big"), "cfg"),
    "scale nan": (lambda m: m.plan(cfg=float("nan")), "finite"),
    "scale text": (lambda m: m.plan(cfg="strong"), "cfg='strong'"),
    "solver": (lambda m: m.plan(solver="ddim"), "unknown solver"),
    "solver 3": (lambda m: m.plan(solver=3), "give text"),
    "accelerate": (lambda m: m.plan(accelerate="warp"), "unknown preset"),
    "setting": (lambda m: m.plan(guidance=2), "no setting 'guidance'"),
    "grid": (lambda m: m.plan(grid="log"), "unknown grid"),
    "channels": (lambda m: m.sample(2, plan=m.plan(cfg=2, cfg_channels=4)), "1 channels"),
    "adaptive preset": (lambda m: m.plan(solver="dopri5", accelerate="fast"), "as heun, not"),
    "no images": (lambda m: m.sample(0), "at least 1"),
    "half an image": (lambda m: m.sample(1.5), "at least 1"),
    "label 11": (lambda m: m.sample(2, labels=11), "classes 0 to 9"),
    "label -1": (lambda m: m.sample(2, labels=[-1, 2]), "classes 0 to 9"),
    "label of no name": (lambda m: m.sample(2, labels="cat"), "write numbers"),
    "label 1.5": (lambda m: m.sample(2, labels=1.5), "a class or several"),
    "seed -1": (lambda m: m.sample(2, seed=-1), "0 to 4294967295"),
    "seed 2^32": (lambda m: m.sample(2, seed=2**32), "0 to 4294967295"),
    "seed 0.5": (lambda m: m.sample(2, seed=0.5), "whole number"),
    "NCHW noise": (lambda m: m.sample(noise=X.transpose(0, 3, 1, 2)), "channels last"),
    "noise of another size": (lambda m: m.sample(noise=X[:, :4]), "the model takes"),
    "noise of text": (lambda m: m.sample(noise="x"), "numbers of shape"),
    "NaN noise": (lambda m: m.sample(noise=X * np.nan), "NaN"),
    "num against noise": (lambda m: m.sample(3, noise=X), "holds 2 images"),
    "decode": (lambda m: m.sample(2, decode="jpeg"), "vae:DIR"),
    "decode None": (lambda m: m.sample(2, decode=None), "vae:DIR"),
    "decode in a bucket": (lambda m: m.sample(2, decode="vae:s3://b/v"), "s3://"),
    "decode pixels": (lambda m: m.sample(2, decode="vae:x"), "makes pixels"),
    "microbatch": (lambda m: m.sample(2, microbatch=0), "microbatch"),
    "batch": (lambda m: m.images(np.arange(2), np.arange(2), batch=0), "batch"),
    "weak of another kind": (lambda m: m.plan(weak="runs/s2"), "a model"),
    "no plan": (lambda m: m.sample(2, plan="fast"), "another model"),
    "time 2": (lambda m: m.velocity(X, 2, 0), "from 0"),
    "two stages": (lambda m: m.velocity(X, [0.1, 0.9], 0), "give stage="),
    "stage 5": (lambda m: m(X, 0.5, 0, stage=5), "stages 0 to 1"),
    "no samples": (lambda m: pf.evaluate(X, "digits", "x"), "no checkpoint|uint8"),
}  # fmt: skip


def main(run: str) -> int:
    model, bad = pf.load(run), 0
    for name, (call, words) in WRONG.items():
        try:
            call(model)
            problem = "nothing raised"
        except pf.InputError as error:
            good = re.search(words, str(error)) and "\n" not in str(error)
            problem = "" if good else str(error)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            bad += 1
            print(f"{name}: {problem}")
    print(f"{len(WRONG)} wrong calls, {bad} not answered as they should be")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
