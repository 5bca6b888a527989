"""A run on the Hugging Face hub: what is uploaded, and the page about it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from ppflow_jax.api.plans import OWN
from ppflow_jax.checkpoints.card import Card
from ppflow_jax.checkpoints.weights import save_weights, stored_weights
from ppflow_jax.errors import InputError
from ppflow_jax.files.hub import HUB, Address, api, one_line
from ppflow_jax.files.scratch import scratch
from ppflow_jax.files.store import FOLDER, digest
from ppflow_jax.models.network import Params
from ppflow_jax.report.evaluation import METRICS, judged
from ppflow_jax.report.run import Run
from ppflow_jax.train.validate import EVALUATIONS

GRID = "samples.png"
_REPLACED = (f"{FOLDER}/*", f"{EVALUATIONS}/*", OWN, GRID)  # by every push


def publish(run: Run, target: str, private: bool = False) -> str:
    """Upload `run` to `target`, hf:OWNER/REPO, and say where it is.

    Args:
      private: of a repository that is not there yet.

    Raises:
      InputError: not a repository, or one that cannot be written; a damaged run.
    """
    address, hub = Address.parse(target), api()
    if address.file or address.revision:
        raise InputError(f"{target}: a whole repository is pushed: write {HUB}{address.repo}")
    folder = scratch("push")
    write_folder(run, address.repo, folder)
    with one_line(target):
        client = hub.HfApi()
        client.create_repo(address.repo, private=private, exist_ok=True)
        commit = client.upload_folder(
            repo_id=address.repo,
            folder_path=str(folder),
            delete_patterns=list(_REPLACED),
            commit_message=f"{run.name}: step {run.checkpoint.name}",
        )
    return f"{run.checkpoint} is {HUB}{address.repo}@{commit.oid[:12]}"


def write_folder(run: Run, repo: str, folder: Path) -> None:
    """What is uploaded of a run, as files in a new folder.

    Raises:
      InputError: a damaged run.
    """
    experiment = run.card.experiment and _without_folders(run.card.experiment)
    card = replace(run.card, experiment=experiment, base=None)
    if experiment:
        experiment["train"]["trainable"] = [".*"]  # the weights of its base are here too
    params = stored_weights(run.checkpoint, run.card, "ema")
    save_weights(folder, card, params)
    if run.plan:
        sha256 = digest(folder)
        made = run.plan.made | {"checkpoint_sha256": sha256}
        replace(run.plan, made=_without_folders(made)).write(folder / OWN)
    if run.grids:
        (folder / GRID).write_bytes(run.grids[-1].read_bytes())
    for number, result in enumerate(run.evaluations):
        file = folder / EVALUATIONS / f"{number:02d}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(_without_folders(result), indent=1) + "\n")
    (folder / "README.md").write_text(page(run, card, repo, params))


def page(run: Run, card: Card, repo: str, params: Params) -> str:
    """The model card, in Markdown with the hub's YAML before it."""
    model = card.model
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    size = "x".join(map(str, model.shape))
    told = f"{model.num_classes} classes" if model.num_classes else "no classes"
    lines = [
        "---",
        "library_name: ppflow_jax",
        "pipeline_tag: unconditional-image-generation",
        "tags:",
        "- pyramidal-patchification-flow",
        "- diffusion-transformer",
        "- jax",
        "---",
        "",
        f"# {repo.partition('/')[2]}",
        "",
        f"A diffusion transformer of [ppflow_jax](https://arxiv.org/abs/2506.23543): {count:,} "
        f"parameters, width {model.width}, depth {model.depth}, {model.heads} heads; {card.space} "
        f"of {size}, {told}; stages {model.pyramid}; {card.flow.path} path, "
        f"{card.flow.prediction}. The weights are the moving average of step "
        f"{run.checkpoint.name}.",
        "",
        "```bash",
        "pip install 'ppflow_jax[hub]'",
        f"ppflow sample --checkpoint={HUB}{repo} --out=samples --num=16"
        + (" --accelerate=auto" if run.plan else ""),
        "```",
        "",
    ]
    if run.grids:
        lines += [f"![Samples of the moving average]({GRID})", ""]
    lines += _evaluations(run)
    if run.plan:
        lines += [f"`{OWN}` is a sampling plan, `--accelerate=auto` takes it.", ""]
    if card.experiment:
        text = json.dumps(card.experiment, indent=1)
        lines += ["<details><summary>Configuration</summary>", "", "```json", text, "```", ""]
        lines += ["</details>", ""]
    return "\n".join(lines)


def _evaluations(run: Run) -> list[str]:
    """A table of what `evaluate` found, with what its numbers depend on."""
    rows = [judged(result) for result in run.evaluations]
    if not rows:
        return []
    names = [name for name in METRICS if any(name in row.metrics for row in rows)]
    heads = ["sampler", "NFE", "images", *(METRICS[name] for name in names), "features", "card"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for number, row in enumerate(rows):
        values = [f"{row.metrics[n]:.4g}" if n in row.metrics else "" for n in names]
        card = f"`{EVALUATIONS}/{number:02d}.json`"
        cells = [_without_folders(row.setting), row.nfe, str(row.count), *values, row.network, card]
        lines.append(f"| {' | '.join(cells)} |")
    notes = dict.fromkeys(note for row in rows for note in row.notes)
    return [*lines, "", *(f"* {note}" for note in notes), ""]


def _without_folders(values: Any) -> Any:
    """The same with only the last parts of absolute paths and addresses in its texts."""
    if isinstance(values, dict):
        return {key: _without_folders(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_without_folders(value) for value in values]
    if isinstance(values, str):
        return re.sub(r"(?:(?:gs|s3):/)?/[^\s,='\"]*/(?=[^/\s,='\"]+)", "", values)
    return values
