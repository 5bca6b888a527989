"""A SiT made into a pyramid by training all of it or a part: quality, share trained, disk.

    python -m benchmarks.fine_tuning --config=configs/digits.py --features=FEATURES --out=DIR \\
        [--seeds=3] [--sit_steps=600] [--config.train.steps=300]

With every seed a SiT is trained with the last patch of the configuration's pyramid, expanded, and
trained further by each method of `ppflow_jax.systems.adapters`, from the same weights on the same
batches. All are sampled from the same noise and judged by `evaluate`'s metrics. Runs are kept in
DIR/SEED/METHOD, so that the same command continues where it stopped. Writes DIR/fine_tuning.md and
DIR/fine_tuning.json.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from benchmarks.settings import same_settings
from ppflow_jax import cli
from ppflow_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment of the pyramid.")
_OUT = flags.DEFINE_string("out", None, "Folder of the runs; what is there is kept.")
_FEATURES = flags.DEFINE_string("features", None, "As of evaluate.")
_REFERENCE = flags.DEFINE_string("reference", "digits", "As of evaluate.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Training seeds 0, 1, ...")
_SIT_STEPS = flags.DEFINE_integer("sit_steps", 600, "Training steps of the SiT.")
_LR = flags.DEFINE_list(
    "lr",
    ["full=0.001", "lora=0.003", "difffit=0.01", "bitfit=0.01"],
    "Methods with their peak learning rates.",
)
_NUM = flags.DEFINE_integer("num", 1000, "Samples of every run.")

METRICS = ("fid", "kid")
BATCH = 250


def main() -> None:
    import jax

    from ppflow_jax.devices.host_memory import keep_scratch

    rates = _rates(_LR.value)
    if _SEEDS.value < 1 or _NUM.value < 2:
        raise InputError("--seeds must be at least 1, --num at least 2")
    keep_scratch()
    out = Path(_OUT.value).absolute()
    jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
    same_settings(out, "sit_steps", "lr", "num", "features", "reference")
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in range(_SEEDS.value):
        here = out / str(seed)
        sit, start = _start(here, seed)
        for name, folder in (("sit", sit), ("expanded", start)):
            rows.setdefault(name, []).append(_judged(folder, here / f"{name}.json"))
        for name, rate in rates.items():
            folder = _tuned(here / name, start, name, rate, seed)
            rows.setdefault(name, []).append(_judged(folder, here / f"{name}.json"))
    (out / "fine_tuning.json").write_text(json.dumps(rows, indent=1) + "\n")
    text = _table(rows)
    (out / "fine_tuning.md").write_text(text)
    print(text)


def _rates(texts: list[str]) -> dict[str, float]:
    from ppflow_jax.systems.adapters import PRESETS

    found = {}
    for text in texts:
        name, _, rate = text.partition("=")
        if name not in PRESETS:
            raise InputError(
                f"--lr has {text!r}: give METHOD=RATE with one of {', '.join(PRESETS)}"
            )
        found[name] = cli.numbers("lr", [rate])[0]
    return found


def _start(here: Path, seed: int) -> tuple[Path, Path]:
    """The run of a SiT, and the pyramid that it makes before it is trained further."""
    from dataclasses import replace

    from ppflow_jax.checkpoints.card import read_card
    from ppflow_jax.checkpoints.weights import save_weights, stored_weights
    from ppflow_jax.files.store import find_checkpoint
    from ppflow_jax.pyramid import Pyramid, Stage
    from ppflow_jax.systems.expand import expand

    config, start = _configured(seed), here / "start"
    pyramid = Pyramid.parse(config.model.pyramid)
    last = Pyramid((Stage(1.0, pyramid.stages[-1].patch),))
    config.model.pyramid, config.train.steps = str(last), _SIT_STEPS.value
    sit = _trained(here / "sit", config)
    if not start.exists():
        folder = find_checkpoint(sit)
        card = read_card(folder)
        model, params = expand(card.model, stored_weights(folder, card, "ema"), pyramid, seed)
        save_weights(start, replace(card, model=model, experiment=None), params)
    return sit, start


def _tuned(folder: Path, start: Path, name: str, rate: float, seed: int) -> Path:
    from ppflow_jax.systems.adapters import tune

    config = tune(_configured(seed), name)
    config.init_from, config.optim.lr = str(start), rate
    return _trained(folder, config)


def _configured(seed: int) -> ConfigDict:
    config = _CONFIG.value.copy_and_resolve_references().unlock()
    config.seed = seed
    return config


def _trained(folder: Path, config: ConfigDict) -> Path:
    """The run in `folder`, trained to its last step."""
    from ppflow_jax.train.loop import train

    if not (folder / "checkpoints" / str(config.train.steps)).exists():
        print(f"{folder}: {config.train.steps} steps", flush=True)
        train(config, str(folder))
    return folder


def _judged(folder: Path, file: Path) -> dict[str, Any]:
    """Metrics of EMA samples, share of the parameters that are trained, bytes of a checkpoint."""
    import jax

    import ppflow_jax as pf
    from ppflow_jax.checkpoints.card import read_card
    from ppflow_jax.files.disk import atomic
    from ppflow_jax.files.store import find_checkpoint
    from ppflow_jax.models.network import abstract_params
    from ppflow_jax.models.trees import split

    if file.exists():
        return json.loads(file.read_text())
    model, sample = pf.load(folder), _CONFIG.value.sample
    plan = model.plan(steps=sample.steps, solver=sample.solver, cfg=tuple(sample.cfg))
    samples = model.sample(_NUM.value, plan=plan, microbatch=BATCH, decode=sample.decode)
    result = pf.evaluate(samples, _REFERENCE.value, _FEATURES.value, metrics=METRICS)
    step = find_checkpoint(folder)
    card = read_card(step)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    abstract = abstract_params(card.model)
    found = result["metrics"] | {
        "parameters": count(abstract),
        "trained": count(split(abstract, card.trainable)[0]) if card.experiment else 0,
        "bytes": sum(path.stat().st_size for path in step.rglob("*") if path.is_file()),
    }
    with atomic(file) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{folder}: {found}", flush=True)
    return found


def _table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Means over seeds, with the least and the largest."""
    lines = ["| method | trained | checkpoint | FID | KID |", "|---|---|---|---|---|"]

    def figure(found: list[dict[str, Any]], metric: str, digits: int) -> str:
        values = [row[metric] for row in found]
        low, high = (f"{f(values):.{digits}f}" for f in (min, max))
        return f"{statistics.fmean(values):.{digits}f} ({low} to {high})"

    for name, found in rows.items():
        share = found[0]["trained"] / found[0]["parameters"]
        lines.append(
            f"| {name} | {share:.2%} | {found[0]['bytes'] / 1e6:.2f} MB | "
            f"{figure(found, 'fid', 2)} | {figure(found, 'kid', 5)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main, required=("config", "out", "features"))
