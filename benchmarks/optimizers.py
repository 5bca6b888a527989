"""Muon against AdamW, and the length of the EMA chosen after training: FID of each.

    python -m benchmarks.optimizers --config=configs/digits.py --features=FEATURES --out=DIR \\
        [--seeds=3] [--lr=adamw=0.001,muon=0.001] [--lengths=0.02,0.05,0.1,0.15,0.2,0.25] \\
        [--config.train.steps=600]

With every seed a model is trained by each optimizer on the same batches, with post-hoc EMA beside
the EMA of the configuration. Its last parameters, that EMA and an average of each length are
sampled from the same noise and judged by `evaluate`'s metrics. Runs and judgements are kept in
DIR/SEED/OPTIMIZER, so that the same command continues where it stopped; seeds may be added. Writes
DIR/optimizers.md and DIR/optimizers.json.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from benchmarks.settings import same_settings
from ppflow_jax import cli
from ppflow_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment; its optimizer is replaced.")
_OUT = flags.DEFINE_string("out", None, "Folder of the runs; what is there is kept.")
_FEATURES = flags.DEFINE_string("features", None, "As of evaluate.")
_REFERENCE = flags.DEFINE_string("reference", "digits", "As of evaluate.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Training seeds 0, 1, ...")
_LR = flags.DEFINE_list(
    "lr", ["adamw=0.001", "muon=0.001"], "Optimizers with their peak learning rates."
)
_LENGTHS = flags.DEFINE_list(
    "lengths", ["0.02", "0.05", "0.1", "0.15", "0.2", "0.25"], "sigma_rel of averages."
)
_NUM = flags.DEFINE_integer("num", 1000, "Samples of every row.")

METRICS = ("fid", "kid")
BATCH = 250
TRACKED, KEPT = (0.05, 0.10), 30  # widths that are tracked, and how often they are kept

Rows = dict[str, list[dict[str, float]]]  # by optimizer and weights, one of every seed


def main() -> None:
    import jax

    from ppflow_jax.devices.host_memory import keep_scratch
    from ppflow_jax.train.posthoc import check_widths

    rates, lengths = _rates(_LR.value), cli.numbers("lengths", _LENGTHS.value)
    check_widths(lengths, "--lengths")
    if _SEEDS.value < 1 or _NUM.value < 2:
        raise InputError("--seeds must be at least 1, --num at least 2")
    keep_scratch()
    out = Path(_OUT.value).absolute()
    jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
    same_settings(out, "lr", "lengths", "num", "features", "reference")
    rows: Rows = {}
    for seed in range(_SEEDS.value):
        for name, rate in rates.items():
            folder = out / str(seed) / name
            _train(folder, name, rate, seed)
            for weights, path, which in _candidates(folder, lengths):
                row = _judged(path, which, folder / f"{weights}.json")
                rows.setdefault(f"{name} {weights}", []).append(row)
    (out / "optimizers.json").write_text(json.dumps(rows, indent=1) + "\n")
    text = _table(rows)
    (out / "optimizers.md").write_text(text)
    print(text)


def _rates(texts: list[str]) -> dict[str, float]:
    from ppflow_jax.train.optimizer import NAMES

    found = {}
    for text in texts:
        name, _, rate = text.partition("=")
        if name not in NAMES:
            raise InputError(f"--lr has {text!r}: give NAME=RATE with one of {', '.join(NAMES)}")
        found[name] = cli.numbers("lr", [rate])[0]
    return found


def _train(folder: Path, name: str, rate: float, seed: int) -> None:
    from ppflow_jax.train.loop import train

    config = _CONFIG.value.copy_and_resolve_references().unlock()
    steps = config.train.steps
    config.seed, config.optim.name, config.optim.lr = seed, name, rate
    config.train.posthoc_ema = TRACKED
    config.train.save_every, config.train.keep = max(1, steps // KEPT), 1
    if not (folder / "checkpoints" / str(steps)).exists():
        print(f"{folder}: {steps} steps", flush=True)
        train(config, str(folder))


def _candidates(folder: Path, lengths: list[float]) -> list[tuple[str, Path, str]]:
    """What is judged of a run: its name, its folder, and which of the weights there."""
    from ppflow_jax.convert.posthoc import make_average

    found = [("last", folder, "params"), ("ema", folder, "ema")]
    for length in lengths:
        target = folder / f"average_{length}"
        if not target.exists():
            make_average(str(folder), target, length)
        found.append((target.name, target, "ema"))
    return found


def _judged(folder: Path, which: str, file: Path) -> dict[str, float]:
    import ppflow_jax as pf
    from ppflow_jax.files.disk import atomic

    if file.exists():
        return json.loads(file.read_text())
    model, sample = pf.load(folder, weights=which), _CONFIG.value.sample
    plan = model.plan(steps=sample.steps, solver=sample.solver, cfg=tuple(sample.cfg))
    samples = model.sample(_NUM.value, plan=plan, microbatch=BATCH, decode=sample.decode)
    result: dict[str, Any] = pf.evaluate(
        samples, _REFERENCE.value, _FEATURES.value, metrics=METRICS
    )
    with atomic(file) as temporary:
        temporary.write_text(json.dumps(result["metrics"], indent=1) + "\n")
    print(f"{file.with_suffix('')}: {result['metrics']}", flush=True)
    return result["metrics"]


def _table(rows: Rows) -> str:
    """Means over seeds, with the standard deviation and the least and the largest of FID."""
    lines = [
        "| optimizer | weights | seeds | FID ± standard deviation | least to largest | KID |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        optimizer, _, weights = name.partition(" ")
        fids, kid = [row["fid"] for row in found], statistics.fmean(row["kid"] for row in found)
        spread = f" ± {statistics.stdev(fids):.2f}" if len(fids) > 1 else ""
        lines.append(
            f"| {optimizer} | {weights.replace('average_', 'sigma_rel ')} | {len(fids)} | "
            f"{statistics.fmean(fids):.2f}{spread} | {min(fids):.2f} to {max(fids):.2f} | "
            f"{kid:.5f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main, required=("config", "out", "features"))
