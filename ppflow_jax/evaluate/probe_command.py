"""The work of the command `probe`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from ppflow_jax import console
from ppflow_jax.api.inputs import check_unconditional
from ppflow_jax.api.model import Model
from ppflow_jax.checkpoints.card import Card
from ppflow_jax.checkpoints.weights import open_weights
from ppflow_jax.cli import numbers
from ppflow_jax.errors import InputError
from ppflow_jax.evaluate.probing import Examples, Sweep, probe, read_examples
from ppflow_jax.files.disk import atomic, writable_directory
from ppflow_jax.files.place import lexical, place
from ppflow_jax.files.store import digest
from ppflow_jax.generate.provenance import origin
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.train.inputs import open_inputs

FLAGS = flags.FLAGS
Rows = list[dict[str, Any]]


def run() -> None:
    """What the flags of the command say."""
    if jax.process_count() > 1:
        raise InputError("probe runs in one process: start it on one host")
    if FLAGS.batch < 1 or FLAGS.num < 1:
        raise InputError("--batch and --num must be at least 1")
    weights = open_weights(FLAGS.checkpoint, FLAGS.weights)
    check_unconditional(weights.card.model, "probe")
    sweep = sweep_of(weights.card.model)
    sweep.check(weights.card.model)
    source, encoder, card = open_inputs(data_of(weights.card), weights.card)
    out = json_path("probe")
    examples = read_examples(source, encoder, FLAGS.num, FLAGS.batch, FLAGS.seed)
    model = Model(weights)
    rows = probe(model, examples, sweep, batch=FLAGS.batch, seed=FLAGS.seed)
    best = max(rows, key=lambda row: row["accuracy"])
    held = examples.labels[examples.held_out]
    result = {
        "best": best,
        "chance": float(np.bincount(held).max() / len(held)),
        "examples": {"trained_on": len(examples) - len(held), "held_out": len(held)},
        "settings": {
            "checkpoint_sha256": digest(weights.path),
            "weights": weights.which,
            "data": card.experiment["trained_on"],
            "num": FLAGS.num,
            "seed": FLAGS.seed,
        },
        **origin(weights.path, card),
        "rows": rows,
    }
    with atomic(out) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    figure = out.with_suffix(".png")
    save_heat_map(figure, rows, sweep)
    print(f"{source.name}: {_counts(examples)}; the largest class is {result['chance']:.1%}")
    print(text(rows, sweep))
    print(
        f"best: {best['accuracy']:.1%} at t={best['time']:g} (stage {best['stage']}), block "
        f"{best['block']}, {best['pool']}, {best['head']}; all in {out} and {figure.name}"
    )


def _counts(examples: Examples) -> str:
    held = int(examples.held_out.sum())
    return f"{len(examples) - held:,} examples to train heads on, {held:,} to judge them"


def sweep_of(model: ModelConfig) -> Sweep:
    """Of the flags.

    Raises:
      InputError: what is no number.
    """
    blocks = range(1, model.depth + 1)
    if FLAGS.blocks != ["all"]:
        found = numbers("blocks", FLAGS.blocks)
        if not all(b.is_integer() for b in found):
            raise InputError(f"--blocks={','.join(FLAGS.blocks)}: write whole numbers, or all")
        blocks = map(int, found)
    times = numbers("times", FLAGS.times)
    return Sweep(tuple(blocks), times, tuple(FLAGS.pools), tuple(FLAGS.heads))


def data_of(card: Card) -> ConfigDict:
    """The `data` of a configuration: that of the run, or of the flags.

    Raises:
      InputError: neither.
    """
    trained = (card.experiment or {}).get("data")
    if FLAGS.source is None and trained is None:
        raise InputError(f"{FLAGS.checkpoint} does not say what it was trained on: give --source")
    names = ("source", "path", "split", "image_feature", "label_feature", "vae")
    given = {name: FLAGS[name].value for name in names}
    if FLAGS.source is None:
        given = {name: trained[name] for name in names} | {"path": FLAGS.path or trained["path"]}
    return ConfigDict(given | {"space": card.space, "fields": (), "task": "none", "stage": ""})


def json_path(command: str) -> Path:
    """Where the JSON of a command goes; proves that it can be written there.

    Raises:
      InputError: a folder, or the place of the picture beside it.
    """
    run = lexical(FLAGS.checkpoint)
    path = place(FLAGS.out) if FLAGS.out else run.with_name(f"{run.name}.{command}.json")
    writable_directory(path.parent)
    if path.is_dir() or path.suffix == ".png":
        raise InputError(f"--out={path}: name a JSON file; the heat map is beside it as .png")
    return path


def accuracies(rows: Rows, sweep: Sweep, pool: str, head: str) -> np.ndarray:
    """Of the held-out examples, [blocks, times]."""
    found = {
        (r["block"], r["time"]): r["accuracy"]
        for r in rows
        if (r["pool"], r["head"]) == (pool, head)
    }
    return np.array([[found[block, t] for t in sweep.times] for block in sweep.blocks])


def text(rows: Rows, sweep: Sweep) -> str:
    """A table of blocks and times for every pool and head."""
    stages = {r["time"]: r["stage"] for r in rows}
    parts = []
    for head in sweep.heads:
        for pool in sweep.pools:
            head_row = ["block", *(f"t={t:g} (stage {stages[t]})" for t in sweep.times)]
            values = accuracies(rows, sweep, pool, head)
            body = [[str(b), *(f"{v:.1%}" for v in row)] for b, row in zip(sweep.blocks, values)]
            parts.append(f"{head}, {pool}\n{console.table([head_row, *body])}")
    return "\n\n".join(parts)


def save_heat_map(path: Path, rows: Rows, sweep: Sweep) -> None:
    """Accuracy over time and block, a panel for every pool and head."""
    from matplotlib.figure import Figure

    shape = (len(sweep.heads), len(sweep.pools))
    height = 1.2 + 0.3 * len(sweep.blocks)
    figure = Figure(figsize=(1.5 + 3.5 * shape[1], height * shape[0] + 0.5), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False)
    every = [r["accuracy"] for r in rows]
    for i, head in enumerate(sweep.heads):
        for j, pool in enumerate(sweep.pools):
            axes, values = panels[i][j], accuracies(rows, sweep, pool, head)
            shown = axes.imshow(values, aspect="auto", vmin=min(every), vmax=max(every))
            axes.set_xticks(range(len(sweep.times)), [f"{t:g}" for t in sweep.times])
            axes.set_yticks(range(len(sweep.blocks)), sweep.blocks)
            axes.set(xlabel="t (0 noise, 1 data)", ylabel="block", title=f"{head}, {pool}")
    figure.colorbar(shown, ax=panels, label="accuracy on held-out examples")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
