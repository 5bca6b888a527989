"""Awkward flag values and arrays: seeds, addresses, numbers out of range, odd npz and npy files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from ppflow_jax.metrics.networks import save_small
from ppflow_jax.metrics.small_network import FeatureNet, FeatureNetConfig
from tests import commands
from tests.acceptance.case import Case

CONFIG = f"--config={commands.ROOT}/configs/digits.py"

SAMPLE = {
    "seed -1": (["--seed=-1"], 1, "0 to 4294967295"),
    "seed 2^32": (["--seed=4294967296"], 1, "0 to 4294967295"),
    "seed 2^64": (["--seed=18446744073709551616"], 1, "0 to 4294967295"),
    "seed 1.5": (["--seed=1.5"], 2, "invalid literal"),
    "seed 2^32-1": (["--seed=4294967295"], 0, "4 images"),
    "seed 2^31": (["--seed=2147483648"], 0, "4 images"),
    "no images": (["--num=0"], 1, "at least 1"),
    "fewer than no images": (["--num=-3"], 1, "at least 1"),
    "batch 0": (["--batch=0"], 1, "at least 1"),
    "microbatch 0": (["--microbatch=0"], 1, "at least 1"),
    "no steps": (["--steps=0"], 1, "steps"),
    "cfg nan": (["--cfg=nan"], 1, "finite"),
    "cfg inf": (["--cfg=1,inf"], 1, "finite"),
    "cfg empty": (["--cfg="], 1, "scale|cfg"),
    "three scales for two stages": (["--cfg=1,2,3"], 1, "scale"),
    "cfg text": (["--cfg=big"], 1, "write e.g."),
    "cfg_until beyond 1": (["--cfg=1,2", "--cfg_until=0.5,2"], 1, "one increasing time"),
    "cfg_channels 9": (["--cfg=2", "--cfg_channels=9"], 1, "channel"),
    "rtol -1": (["--solver=dopri5", "--rtol=-1"], 1, "tol"),
    "rtol nan": (["--solver=dopri5", "--rtol=nan"], 1, "tol"),
    "diffusion_norm nan": (["--solver=sde-euler", "--diffusion_norm=nan"], 1, "diffusion"),
    "unknown solver": (["--solver=ddim"], 1, "unknown solver"),
    "label 11": (["--labels=11"], 1, "classes 0 to 9"),
    "label of no name": (["--labels=cat"], 1, "write numbers"),
    "labels with a blank": (["--labels=1, 2"], 0, "4 images"),
    "out in a bucket": (["--out=gs://bucket/samples"], 1, "gs:// addresses are not supported"),
    "decode in a bucket": (["--decode=vae:s3://bucket/vae"], 1, "s3:// addresses"),
    "decode from a hub": (["--decode=vae:hf://stabilityai/sd-vae"], 1, "hf:// addresses"),
    "bucket with one slash": (["--out=gs:/bucket/samples"], 1, "gs:// addresses"),
    "file address": (["--out=file:///tmp/x"], 1, "leave it out|not supported"),
    "unknown accelerator": (["--accelerate=warp=9"], 1, "warp"),
}
MAIN = {
    "seed -1": (["--config.seed=-1"], 1, "0 to 4294967295"),
    "seed 2^32": (["--config.seed=4294967296"], 1, "0 to 4294967295"),
    "seed 2^31": (["--config.seed=2147483648"], 0, "done"),
    "seed 2^32-1": (["--config.seed=4294967295"], 0, "done"),
    "workdir in a bucket": (["--workdir=gs://bucket/run"], 1, "gs:// addresses"),
    "data on the web": (["--config.data.path=https://host/x"], 1, "https:// addresses"),
    "init_from a hub": (["--config.init_from=hf://who/what"], 1, "hf:// addresses"),
    "config on the web": (["--config=https://host/c.py"], 1, "https:// addresses"),
    "lr nan": (["--config.optim.lr=nan"], 1, "lr"),
    "lr 0": (["--config.optim.lr=0."], 1, "lr"),
    "ema 1": (["--config.train.ema=1."], 1, "ema"),
    "ema nan": (["--config.train.ema=nan"], 1, "ema"),
    "batch 0": (["--config.data.batch_size=0"], 1, "batch"),
    "batch -16": (["--config.data.batch_size=-16"], 1, "batch"),
    "no blocks": (["--config.model.depth=0"], 1, "depth"),
    "three heads": (["--config.model.heads=3"], 1, "heads"),
    "label_drop 2": (["--config.flow.label_drop=2."], 1, "label_drop"),
    "no sample grid": (["--config.sample.count=0"], 1, "count"),
    "sample every -1": (["--config.sample.every=-1"], 1, "every"),
    "no classes": (["--config.model.num_classes=0"], 1, "classes"),
    "unknown key": (["--config.train.stepz=3"], 2, "stepz"),
    "pyramid of words": (["--config.model.pyramid=big"], 1, "pyramid|stage"),
    "warmup -1": (["--config.optim.warmup_steps=-1"], 1, "warmup"),
    "weight decay nan": (["--config.optim.weight_decay=nan"], 1, "weight_decay"),
}
BENCH = {"bench: no steps": (["--steps=0"], 1, "at least 1|step"),
         "bench: batch 0": (["--batch=0"], 1, "at least 1|batch"),
         "bench: rounds 0": (["--rounds=0"], 1, "at least 1|round"),
         "bench: json in a bucket": (["--json=gs://b/x.json"], 1, "gs:// addresses"),
         "bench: size M": (["--size=M"], 1, "give some of")}  # fmt: skip


def cases(root: Path) -> list[Case]:
    run = root / "run"
    code, _, err = commands.train(run)
    if code:
        raise RuntimeError(err)
    made = []
    for k, (name, (args, code, says)) in enumerate(SAMPLE.items()):
        flags = (f"--checkpoint={run}", f"--out={root}/samples{k}", "--num=4", "--steps=2")
        made.append(Case(f"sample: {name}", "sample", (*flags, *args), code, says))
    for k, (name, (args, code, says)) in enumerate(MAIN.items()):
        options = (*commands.SMALL, "--config.train.steps=1")
        args = (CONFIG, f"--workdir={root}/run{k}", *options, *args)
        made.append(Case(f"main: {name}", "main", args, code, says))
    made += [
        Case(name, "bench", tuple(args), code, says) for name, (args, code, says) in BENCH.items()
    ]
    return made + others(root, run) + arrays(root, run) + statistics(root)


def others(root: Path, run: Path) -> list[Case]:
    tail = (f"--checkpoint={run}", "--reference=digits", "--features=digits")
    out = root / "new"
    return [
        Case("evaluate: seed -1", "evaluate", (*tail, "--seed=-1"), 1, "0 to 4294967295"),
        Case("evaluate: one sample", "evaluate", (*tail, "--num=1"), 1, "at least 2"),
        Case("evaluate: bucket", "evaluate", (*tail, "--out=gs://b/x.json"), 1, "gs:// addresses"),
        Case("evaluate: no metric", "evaluate", (*tail, "--metrics=ssim", "--num=2"), 1, "ssim"),
        Case("convert: seed 2^32", "convert.__main__",
             (f"--source={run}", f"--target={out}", "--seed=4294967296"), 1, "0 to 4294967295"),
        Case("convert: bucket", "convert.__main__",
             ("--source=s3://b/x.pt", f"--target={out}"), 1, "s3:// addresses"),
        Case("prepare: bucket", "prepare",
             ("--path=gs://b/x", f"--out={out}", f"--vae=vae:{root}"), 1, "gs:// addresses"),
        Case("prepare: size 0", "prepare",
             (f"--path={root}", f"--out={out}", f"--vae=vae:{root}", "--size=0"), 1, "at least 1"),
        Case("report: seed -1", "report.__main__",
             (str(run), f"--out={out}.html", "--seed=-1"), 1, "0 to 4294967295"),
        Case("report: bucket", "report.__main__", ("gs://b/run",), 1, "gs:// addresses"),
        Case("report: steps 0", "report.__main__",
             (str(run), f"--out={out}.html", "--steps=0"), 1, "steps"),
    ]  # fmt: skip


def arrays(root: Path, run: Path) -> list[Case]:
    """`--noise` and `latents.npy` of dtypes and orders that NumPy has trouble with."""
    noise = np.random.default_rng(0).standard_normal((4, 8, 8, 1)).astype(np.float32)
    bad = noise.copy()
    bad[1, 2] = np.nan
    files = {
        "bfloat16": (noise.astype(ml_dtypes.bfloat16), 1, "bfloat16"),
        "float64": (noise.astype(np.float64), 1, "float32"),
        "Fortran order": (np.asfortranarray(noise), 0, "4 images"),
        "big-endian": (noise.astype(">f4"), 1, "float32"),
        "NCHW": (noise.transpose(0, 3, 1, 2), 1, r"float32 \(N, 8, 8, 1\)"),
        "NaN": (bad, 1, "NaN"),
    }
    made = []
    for k, (name, (array, code, says)) in enumerate(files.items()):
        path = root / f"noise{k}.npy"
        np.save(path, array)
        flags = (f"--checkpoint={run}", f"--out={root}/noise{k}", f"--noise={path}", "--steps=2")
        made.append(Case(f"noise: {name}", "sample", flags, code, says))
    latents = {
        "bfloat16": (noise.astype(ml_dtypes.bfloat16), np.arange(4), 1, "bfloat16"),
        "whole numbers": (np.int32(noise), np.arange(4), 1, "floating point"),
        "labels of another length": (noise, np.arange(3), 1, "labels must be"),
        "float labels": (noise, np.arange(4.0), 1, "labels must be integers"),
        "labels 2 and 7": (np.tile(noise, (8, 1, 1, 1)), np.tile([2, 7], 16), 0,
                           "2 of the model's 10 classes have examples .2 .16., 7 .16.."),
    }  # fmt: skip
    for k, (name, (x, labels, code, says)) in enumerate(latents.items()):
        folder = root / f"latents{k}"
        folder.mkdir()
        np.save(folder / "latents.npy", x)
        np.save(folder / "labels.npy", labels)
        args = (CONFIG, f"--workdir={root}/arrays{k}", *commands.SMALL, "--config.train.steps=1")
        args += ("--config.data.source=arrays", f"--config.data.path={folder}")
        made.append(Case(f"latents: {name}", "main", args, code, says))
    return [*made, untrained_classes(root / f"arrays{k}", root)]


def untrained_classes(run: Path, root: Path) -> Case:
    """Balanced labels of a run that saw classes 2 and 7 only."""
    out = root / "balanced"

    def check() -> str | None:
        found = np.load(out / "samples.npz")["arr_1"].tolist()
        return None if found == [2, 7, 2, 7] else f"labels {found}"

    flags = (f"--checkpoint={run}", f"--out={out}", "--num=4", "--steps=2")
    return Case("balanced labels of two trained classes", "sample", flags, 0, "4 images", check)


def statistics(root: Path) -> list[Case]:
    """Reference files for `evaluate`."""
    network = FeatureNet(FeatureNetConfig(8, 3, 2))
    params = jax.tree.map(np.asarray, network.init(0))
    save_small(root / "features", network.config, params, {"trained_on": "nothing", "accuracy": 0})
    d = network.config.widths[-1]
    pictures = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    np.savez(root / "samples.npz", arr_0=pictures)
    mu, sigma = np.zeros(d), np.eye(d)
    broken = sigma.copy()
    broken[0, 0] = np.inf
    files = {
        "mu of NaN": (dict(mu=mu * np.nan, sigma=sigma), "mu has values that are NaN"),
        "sigma infinite": (dict(mu=mu, sigma=broken), "sigma has values that are NaN"),
        "sigma negative": (dict(mu=mu, sigma=-sigma), "no covariance"),
        "sigma not symmetric": (dict(mu=mu, sigma=sigma + np.triu(np.ones((d, d)), 1)), "no covariance"),
        "sigma transposed away": (dict(mu=mu, sigma=sigma[:, :3]), "expected .d,. and .d, d."),
        "only mu": (dict(mu=mu), "only one of mu and sigma"),
        "objects": (dict(mu=np.array([{}]), sigma=sigma), "plain arrays"),
        "Fortran order": (dict(arr_0=np.asfortranarray(pictures)), "Fortran order"),
        "NCHW": (dict(arr_0=pictures.transpose(0, 3, 1, 2).copy()), "expected .N, height"),
        "bfloat16 images": (dict(arr_0=pictures.astype(ml_dtypes.bfloat16)), "expected uint8"),
    }  # fmt: skip
    paths = {}
    for k, (name, (content, says)) in enumerate(files.items()):
        path = root / f"reference{k}.npz"
        np.savez(path, **content)
        paths[name] = path, says
    for name, content, says in (
        ("a pickle", pickle.dumps({"mu": mu, "sigma": sigma}), "it is a pickle"),
        ("a pickle called npz", pickle.dumps({"mu": mu}), "it is a pickle"),
        ("empty", b"", "it is empty"),
        ("JSON", json.dumps({"mu": [0]}).encode(), "no npz"),
    ):
        path = root / f"reference_{name.replace(' ', '_')}.{'pkl' if name == 'a pickle' else 'npz'}"
        path.write_bytes(content)
        paths[name] = path, says
    single = root / "single.npy"
    np.save(single, pictures)
    paths["a single npy"] = single, "single .npy"
    tail = (f"--samples={root}/samples.npz", f"--features={root}/features")
    return [
        Case(f"reference: {name}", "evaluate", (f"--reference={path}", *tail), 1, says)
        for name, (path, says) in paths.items()
    ]
