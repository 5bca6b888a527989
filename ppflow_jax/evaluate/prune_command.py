"""The work of the command `prune`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from ppflow_jax import console
from ppflow_jax.api.inputs import check_unconditional
from ppflow_jax.api.model import Model
from ppflow_jax.checkpoints.weights import open_weights, save_weights
from ppflow_jax.cli import numbers
from ppflow_jax.errors import InputError
from ppflow_jax.evaluate.probe_command import data_of, json_path
from ppflow_jax.evaluate.probing import read_examples
from ppflow_jax.evaluate.pruning import Stage, check_prunable, first_leaves, look, students_of
from ppflow_jax.files.disk import atomic
from ppflow_jax.files.store import check_new, digest
from ppflow_jax.generate.provenance import origin
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.flops import forward_flops
from ppflow_jax.models.students import STUDENTS, text
from ppflow_jax.systems.linear_probes import Spans, removable, removed
from ppflow_jax.train.inputs import open_inputs

FLAGS = flags.FLAGS
FLOORS = (0.99, 0.95, 0.9)  # of CKA, for the table


def run() -> None:
    """What the flags of the command say."""
    if jax.process_count() > 1:
        raise InputError("prune runs in one process: start it on one host")
    if min(FLAGS.batch, FLAGS.num) < 1:
        raise InputError("--batch and --num must be at least 1")
    weights = open_weights(FLAGS.checkpoint, FLAGS.weights)
    config = weights.card.model
    check_unconditional(config, "prune")
    check_prunable(config)
    remove = by_stage("remove", FLAGS.remove, config, config.depth - 1)
    ffns = by_stage("ffns", FLAGS.ffns, config, config.depth)
    if FLAGS.shortest < 2 or 0 < FLAGS.longest < FLAGS.shortest or FLAGS.longest < 0:
        raise InputError("--shortest must be at least 2, and --longest 0 or no less than that")
    source, encoder, card = open_inputs(data_of(weights.card), weights.card)
    out = json_path("prune")
    if FLAGS.target:
        check_new(FLAGS.target)
    examples = read_examples(source, encoder, FLAGS.num, FLAGS.batch, FLAGS.seed)
    model, stages = Model(weights), []
    with console.progress(len(config.pyramid), 0, "stage", "prune") as bar:
        for number in range(len(config.pyramid)):
            stages.append(look(model, examples, number, batch=FLAGS.batch, seed=FLAGS.seed))
            bar.update()
    spans = [s.spans(n, FLAGS.shortest, FLAGS.longest) for s, n in zip(stages, remove)]
    students = students_of(stages, spans, [n or 0 for n in ffns])
    taught = replace(config, students=students)
    result = {
        "students": text(students),
        "stages": [summary(s, own, config, taught) for s, own in zip(stages, spans)],
        "settings": {
            "checkpoint_sha256": digest(weights.path),
            "weights": weights.which,
            "data": card.experiment["trained_on"],
            **{name: FLAGS[name].value for name in ("num", "seed", "remove", "ffns")},
            **{name: FLAGS[name].value for name in ("shortest", "longest")},
        },
        **origin(weights.path, card),
    }
    if FLAGS.target and not students:
        raise InputError("there are no students to write: give --remove or --ffns")
    if FLAGS.target:
        own = first_leaves(students, model.params["blocks"], stages)
        params = jax.tree.map(np.asarray, model.params) | {STUDENTS: own}
        save_weights(FLAGS.target, replace(weights.card.alone, model=taught), params)
    with atomic(out) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    figure = out.with_suffix(".png")
    save_heat_map(figure, stages, spans)
    print(f"{source.name}: {len(examples):,} examples\n{table(result['stages'])}")
    print(f"students: {result['students']}; all in {out} and {figure.name}")
    if FLAGS.target:
        print(f"the model with them, before they are trained: {FLAGS.target}")


def by_stage(name: str, texts: list[str] | None, model: ModelConfig, most: int) -> list[int | None]:
    """Whole numbers of a flag, one of every stage, from 0 to `most`.

    Raises:
      InputError: other numbers, or another count of them.
    """
    stages = len(model.pyramid)
    if texts is None:
        return [None] * stages
    found = numbers(name, texts)
    if len(found) not in (1, stages) or any(not 0 <= n <= most or n % 1 for n in found):
        raise InputError(
            f"--{name}={','.join(texts)}: give one whole number, or one of each of the "
            f"{stages} stages, 0 to {most} of the {model.depth} blocks"
        )
    return [int(n) for n in (found * stages if len(found) == 1 else found)]


def summary(stage: Stage, spans: Spans, model: ModelConfig, taught: ModelConfig) -> dict[str, Any]:
    """JSON values of a stage."""

    def square(values: np.ndarray) -> list[list[float | None]]:
        return [[None if np.isnan(v) else float(v) for v in row] for row in values]

    number = stage.number
    flops = forward_flops(taught, number) / forward_flops(model, number)
    return {
        "stage": number,
        "times": stage.times,
        "tokens": stage.tokens,
        "intervals": spans,
        "linear_ffns": [s.first for s in taught.students if s.ffn and s.stage == number],
        "removed": removed(spans),
        "blocks": taught.blocks_at(number),
        "flops": flops,
        "similarity": [float(stage.similarity[span]) for span in spans],
        "removable": {f"{floor:g}": removable(stage.similarity, floor) for floor in FLOORS},
        "probe_residual": stage.probes.residual.tolist(),
        "ffn_residual": stage.ffns.residual.tolist(),
        "cka": square(stage.similarity),
        "delta": square(stage.losses),
    }


def table(stages: list[dict[str, Any]]) -> str:
    """A row for every stage."""
    floors = [f"removable, CKA {floor:g}" for floor in FLOORS]
    lines = [["stage", "intervals", "CKA", "blocks", "FLOPs", "probe error", *floors]]
    for s in stages:
        errors = s["probe_residual"]
        lines.append(
            [
                str(s["stage"]),
                " ".join(f"{first}-{last}" for first, last in s["intervals"]) or "none",
                " ".join(f"{value:.3f}" for value in s["similarity"]),
                f"{s['blocks']} of {len(errors)}",
                f"{s['flops']:.1%}",
                f"{min(errors):.2f} to {max(errors):.2f}",
                *map(str, s["removable"].values()),
            ]
        )
    return console.table(lines)


def save_heat_map(path: Path, stages: list[Stage], spans: list[Spans]) -> None:
    """CKA of chains of probes, a panel for every stage, with the intervals that were chosen."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    depth = len(stages[0].similarity)
    size = 1.5 + 0.3 * depth
    figure = Figure(figsize=(1 + size * len(stages), size + 0.3), layout="constrained")
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    low = min(float(np.nanmin(s.similarity)) for s in stages)
    for axes, stage, own in zip(panels, stages, spans):
        shown = axes.imshow(stage.similarity, vmin=low, vmax=1)
        for first, last in own:
            side = last - first + 1
            axes.add_patch(Rectangle((first - 0.5, first - 0.5), side, side, fill=False, ec="red"))
        axes.set_xticks(range(depth))
        axes.set_yticks(range(depth))
        axes.set(xlabel="last block", ylabel="first block", title=f"stage {stage.number}")
    figure.colorbar(shown, ax=panels, label="CKA of linear probes with the blocks")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
