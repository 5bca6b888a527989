"""The study: variants of the pyramid trained under one budget, judged, and what is claimed of them.

    python -m study.run --config=configs/digits.py --seeds=3 --out=DIR \\
        --reference=digits --features=FEATURES --docs=docs/study_digits

Every row of rows.py is trained with every seed on `--config` (any experiment; its pyramid is
replaced, `--config.a.b=value` sets the budget), sampled from the same noise and labels, and judged
by `evaluate`'s metrics. Rows are kept in DIR/SEED/ROW, so that the same command continues where it
stopped; `--rows` and `--seeds` may grow. It leaves DIR/study.md, plots, a grid of all rows, and
DIR/report.html of the first seed.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

import ppflow_jax as pf
from benchmarks.fast_sampling import timed
from benchmarks.settings import same_settings, tuned_plan
from ppflow_jax import cli
from ppflow_jax.autoencoders.decode import Decoder
from ppflow_jax.checkpoints.card import Card, read_card
from ppflow_jax.checkpoints.weights import load_weights, save_weights
from ppflow_jax.console import progress
from ppflow_jax.data.images import array_images
from ppflow_jax.devices.host_memory import keep_scratch
from ppflow_jax.devices.sharding import local_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic
from ppflow_jax.files.store import find_checkpoint
from ppflow_jax.flow.cost import sampling_flops
from ppflow_jax.flow.plan import SamplerConfig, evaluations
from ppflow_jax.flow.sampler import Sampler, image_noise
from ppflow_jax.generate.images import Generator, choose_labels
from ppflow_jax.metrics.evaluator import Evaluator, open_reference
from ppflow_jax.metrics.networks import load_features
from ppflow_jax.models.network import make_apply
from ppflow_jax.pyramid import Pyramid
from ppflow_jax.systems.accelerate import AccelerateConfig, accelerated
from ppflow_jax.systems.dense2moe import ordered
from ppflow_jax.systems.expand import expand
from ppflow_jax.train.importance import unit_importance
from ppflow_jax.train.loop import train
from ppflow_jax.train.validate import EVALUATIONS
from study import table
from study.rows import ROWS, Guidance, configured, training_cost, ways_of

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Experiment whose pyramid the rows replace; `sample` is how they are judged.",
    lock_config=True,
)
_OUT = flags.DEFINE_string("out", None, "Folder of the runs; rows that are there are kept.")
_ROWS = flags.DEFINE_list(
    "rows",
    [name for name, row in ROWS.items() if "data.fields" not in row.changes],
    f"Of {', '.join(ROWS)}; repa and repa_half need a field of the data.",
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Training seeds 0, 1, ...")
_REFERENCE = flags.DEFINE_string("reference", None, "As of evaluate.")
_SIZE = flags.DEFINE_integer("size", None, "As of evaluate, for a folder of pictures.")
_FEATURES = flags.DEFINE_string("features", None, "As of evaluate.")
_DECODE = flags.DEFINE_string("decode", "none", "vae:DIR or taesd:DIR for latents.")
_NUM = flags.DEFINE_integer("num", 1000, "Samples of every row.")
_TUNED = flags.DEFINE_multi_integer(
    "tuned", [], "Also judge by plans of so many evaluations, fitted to every run; may be repeated."
)
_LATENCY = flags.DEFINE_bool("latency", True, "Measure sampling times; wants a quiet machine.")
_DOCS = flags.DEFINE_string("docs", None, "Also write this .md and its pictures.")

METRICS = ("fid", "kid")
BATCH = 32  # of sampling and its latency


def main() -> None:
    if unknown := [name for name in _ROWS.value if name not in ROWS]:
        raise InputError(f"--rows has {unknown[0]!r}: choose from {', '.join(ROWS)}")
    if "sit" not in _ROWS.value:
        raise InputError("--rows must have sit: costs are shares of its own")
    if _SEEDS.value < 1 or _NUM.value < 2:
        raise InputError("--seeds must be at least 1, --num at least 2")
    stages = max(len(Pyramid.parse(ROWS[name].pyramid)) for name in _ROWS.value)
    if few := [count for count in _TUNED.value if count < stages]:
        raise InputError(f"--tuned={few[0]}: rows have {stages} stages, each needs an evaluation")
    if len(_CONFIG.value.sample.cfg) != 1:
        raise InputError(
            "config.sample.cfg must be one guidance scale: the rows say where it holds"
        )
    out = Path(_OUT.value).absolute()
    reference = open_reference(_REFERENCE.value, _SIZE.value)
    evaluator = Evaluator(load_features(_FEATURES.value, "tf1"), reference, METRICS)
    keep_scratch()
    same_settings(out, "reference", "size", "features", "decode", "num")
    jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))
    for seed in range(_SEEDS.value):
        for name in sorted(_ROWS.value, key=list(ROWS).index):
            folder = _trained(out, name, seed)
            _judged(folder, evaluator)
    times = _latencies(out) if _LATENCY.value else {}
    ways = {name: _ways(_run(out, name, 0)) for name in _ROWS.value}
    table.write(out, ways, _SEEDS.value, times, _DOCS.value)


def _run(out: Path, name: str, seed: int) -> Path:
    return out / str(seed) / name


def _trained(out: Path, name: str, seed: int) -> Path:
    """The row's run, trained to its last step."""
    row, folder = ROWS[name], _run(out, name, seed)
    config = configured(_CONFIG.value, row, seed)
    if not (folder / "checkpoints" / str(config.train.steps)).exists():
        print(f"seed {seed}, {row.title}: {config.train.steps} steps", flush=True)
        if row.starts_from:
            origin = _start(_trained(out, row.starts_from, seed), row.pyramid, seed)
            config.init_from = str(_ranked(origin, seed) if row.ranked else origin)
        if row.teacher:
            config.train.teacher = str(_trained(out, row.teacher, seed))
        start = time.monotonic()
        train(config, str(folder))
        seconds = time.monotonic() - start
        cost = {"training_flops": training_cost(config), "seconds": seconds}
        with atomic(folder / "cost.json") as temporary:
            temporary.write_text(json.dumps(cost))
    return folder


def _start(run: Path, pyramid: str, seed: int) -> Path:
    """Weights of the run's last step, expanded to the pyramid where it has another."""
    source = find_checkpoint(run)
    card = read_card(source)
    if card.model.pyramid == Pyramid.parse(pyramid):
        return run
    target = run.with_name(f"start_{len(Pyramid.parse(pyramid))}")
    if not target.exists():
        params = jax.tree.map(np.asarray, load_weights(source, card, local_mesh()))
        model, params = expand(card.model, params, Pyramid.parse(pyramid), seed)
        save_weights(target, Card(model, card.flow, card.space), params)
    return target


def _ranked(start: Path, seed: int) -> Path:
    """Weights with the hidden units of their MLPs in the order of their importance."""
    target = start.with_name(f"{start.name}_ranked")
    if not target.exists():
        card = read_card(source := find_checkpoint(start))
        params = load_weights(source, card, local_mesh())
        found = unit_importance(card, params, _CONFIG.value.data, 16, BATCH, seed)
        params = jax.tree.map(np.asarray, params)
        save_weights(target, card.alone, params | {"blocks": ordered(params["blocks"], found)})
    return target


def _ways(folder: Path) -> dict[str, Guidance]:
    return ways_of(ROWS[folder.name], _CONFIG.value.sample.cfg[0], _TUNED.value)


def _sampler(folder: Path, card: Card, guidance: Guidance, params) -> Sampler:
    if guidance.tuned:
        file, scales = folder / f"tuned{guidance.tuned}.json", guidance.scales
        return tuned_plan(pf.load(folder), file, scales, guidance.tuned).sampler()
    s = _CONFIG.value.sample
    config = SamplerConfig(s.solver, s.steps, cfg=guidance.scales, cfg_interval=guidance.interval)
    added = AccelerateConfig.parse(ROWS[folder.name].accelerate or "exact")
    segments = accelerated(config, card.model, card.flow, added, params)
    return Sampler(make_apply(card.model), card.model, card.flow, config, segments=segments)


def _judged(folder: Path, evaluator: Evaluator) -> None:
    """Evaluations of a run, one file for every way to guide."""
    checkpoint = find_checkpoint(folder)
    card = read_card(checkpoint)
    (folder / EVALUATIONS).mkdir(exist_ok=True)
    params = None
    for name, guidance in _ways(folder).items():
        path = folder / EVALUATIONS / f"{name}.json"
        if path.exists():
            continue
        if params is None:
            params = load_weights(checkpoint, card, local_mesh())
        sampler = _sampler(folder, card, guidance, params)
        decoder = Decoder.parse(_DECODE.value, card)
        generator = Generator(sampler, decoder, microbatch=BATCH)
        labels = choose_labels("balanced", _NUM.value, card.model.num_classes, 0)
        parts = []
        start = time.monotonic()
        with progress(_NUM.value, 0, "img", f"{folder.name}, {guidance.title}") as bar:
            for images in generator(params, np.arange(_NUM.value), labels):
                parts.append(images.pictures)
                bar.update(len(images.ids))
        seconds = time.monotonic() - start
        pictures = np.concatenate(parts)
        result = evaluator(array_images(guidance.title, pictures))
        result["samples"]["card"] = {
            "settings": asdict(sampler.config),
            "nfe": evaluations(sampler.segments),
            "flops": sampling_flops(card.model, sampler.segments),
            "seconds": seconds,
            "images_in_these_seconds": _NUM.value,
        }
        np.save(folder / EVALUATIONS / f"{name}.npy", pictures[: table.SHOWN])
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(result, indent=1))
        print(
            f"{folder.parent.name}/{folder.name}, {guidance.title}: {result['metrics']}", flush=True
        )


def _latencies(out: Path) -> dict[str, float]:
    """Time of a batch by that of SiT with one scale; models of one shape cost the same.

    But for rows with slices, which depend on the weights.
    """
    runs, known = {}, {}
    for name in _ROWS.value:
        folder = _run(out, name, 0)
        card, params = read_card(find_checkpoint(folder)), None
        for key, guidance in _ways(folder).items():
            facts = (card.model, guidance, name if ROWS[name].accelerate else "")
            known[f"{name} {key}"] = facts
            if facts not in runs:
                if params is None:
                    params = load_weights(find_checkpoint(folder), card, local_mesh())
                runs[facts] = _call(_sampler(folder, card, guidance, params), params, card)
    base = known["sit one"]
    ratios = timed(runs, base, rounds=5)
    return {key: ratios[facts] for key, facts in known.items()} | {"seconds": ratios["seconds"]}


def _call(sampler: Sampler, params, card):
    noise, _ = image_noise(0, np.arange(BATCH, dtype=np.int32), card.model.shape)
    labels = np.arange(BATCH, dtype=np.int32) % card.model.num_classes
    whole = jax.jit(lambda params: sampler(params, noise, labels))
    return lambda: whole(params)


if __name__ == "__main__":
    cli.run(main, required=("config", "out", "reference", "features"))
