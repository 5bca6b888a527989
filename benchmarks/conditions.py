"""Super-resolution and inpainting of digits: trained, sampled, and measured on unseen digits.

    python -m benchmarks.conditions --out=DIR [--seeds=3] [--steps=600] [--num=297]

Trains configs/digits_tasks.py on the first 1,500 digits (a killed command continues) and samples
the condition of others, with Heun's method in 20 steps and no class told. Writes DIR/conditions.md,
means and ranges over the training seeds, and for every seed a grid of each task, DIR/SEED/TASK.png:
condition, sample and truth in rows. PSNR is of pixel values in [-1, 1], a peak of 2; classes are
judged as in benchmarks/digits_consistency.py, whose judge has seen all digits.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from benchmarks.settings import spread
from ppflow_jax import cli
from ppflow_jax.errors import InputError

_OUT = flags.DEFINE_string("out", None, "Folder of runs, table and grids.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Training seeds 0, 1, ...")
_STEPS = flags.DEFINE_integer("steps", 600, "Of training, for each task.")
_NUM = flags.DEFINE_integer("num", 297, "Unseen digits that are sampled, at most 297.")
TRAINED = 1500
SHOWN = 12
HEAD = ("task", "samples", "condition, dB", "hidden part, dB", "class recognised")


class Row(NamedTuple):
    """What is shown of a task, and its figures; PSNR in dB, None where there is none to give."""

    task: str
    samples: str
    condition: float | None
    hidden: float | None
    recognised: float


def main() -> None:
    from ppflow_jax.data.sources import digits
    from ppflow_jax.devices.host_memory import keep_scratch

    data = digits()
    if not SHOWN <= _NUM.value <= len(data) - TRAINED:
        raise InputError(f"--num={_NUM.value}: give {SHOWN} to {len(data) - TRAINED}")
    if _SEEDS.value < 1:
        raise InputError("--seeds must be at least 1")
    keep_scratch()
    out = Path(_OUT.value)
    folder = out / "digits"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "latents.npy", data.x[:TRAINED])
    np.save(folder / "labels.npy", data.labels[:TRAINED])
    unseen = slice(TRAINED, TRAINED + _NUM.value)
    truth, labels = data.x[unseen], data.labels[unseen]
    found = [Row("unseen digits", "as they are", None, None, _recognised(truth, labels))]
    for seed in range(_SEEDS.value):
        for name in ("super_resolution", "inpainting"):
            workdir = out / str(seed) / name
            found += _task(workdir, name, _trained(workdir, folder, name, seed), truth, labels)
    text = _table(found)
    (out / "conditions.md").write_text(text)
    print(text)


def _trained(workdir: Path, folder: Path, name: str, seed: int) -> Any:
    import ppflow_jax as pf
    from configs import digits_tasks
    from ppflow_jax.train.loop import train

    config = digits_tasks.get_config(name)
    config.data.source, config.data.path = "arrays", str(folder)
    config.seed, config.train.steps = seed, _STEPS.value
    train(config, str(workdir))
    return pf.load(workdir)


def _task(workdir: Path, name: str, model: Any, truth: np.ndarray, labels: np.ndarray) -> list[Row]:
    """Rows of the table; writes the grid beside the run."""
    import jax
    import jax.numpy as jnp

    from ppflow_jax.systems.registry import task as task_of

    task = task_of(model.card.experiment["data"]["task"])
    told = np.asarray(task(jnp.asarray(truth), jax.random.key(0)))
    given = {"conditions": {task.condition: told}, "labels": model.config.null_label}
    ways = (None, "end", "steps") if name == "inpainting" else (None,)
    rows, shown = [], []
    for keep in ways:
        plan = model.plan(steps=20, keep=keep)
        made = np.clip(model.sample(plan=plan, **given).latents, -1, 1)
        text = {None: "as they are", "end": "keep=end", "steps": "keep=steps"}[keep]
        fidelity = _fidelity(task, made, told, truth)
        rows.append(Row(name, text, *fidelity, _recognised(made, labels)))
        shown.append(made)
    picture = told[..., -1:]  # of a hidden part 0, a middle grey
    if name == "super_resolution":
        enlarged = Row(name, "enlarged only", None, _psnr(told, truth), _recognised(told, labels))
        rows.insert(0, enlarged)
    _grid(workdir.with_suffix(".png"), (picture, shown[0], truth))
    return rows


def _fidelity(
    task: Any, made: np.ndarray, told: np.ndarray, truth: np.ndarray
) -> tuple[float, float]:
    """PSNR against the condition, and of what the condition does not say against the truth."""
    if task.condition == "low":
        return _psnr(np.asarray(task.enlarged(task.shrunk(made))), told), _psnr(made, truth)
    mask = told[..., :1] > 0
    return _psnr(made, truth, mask), _psnr(made, truth, ~mask)


def _psnr(ours: np.ndarray, theirs: np.ndarray, where: np.ndarray | bool = True) -> float:
    error = np.mean(np.square(ours - theirs), where=where)
    return np.inf if error == 0 else float(10 * np.log10(4 / error))


def _recognised(images: np.ndarray, labels: np.ndarray) -> float:
    """Share of the images, in per cent."""
    from benchmarks.digits_consistency import consistency

    return 100 * consistency(images, labels)[0]


def _grid(path: Path, parts: tuple[np.ndarray, ...]) -> None:
    from ppflow_jax.data.save import save_grid, to_uint8

    rows = [to_uint8(part[:SHOWN], "pixels") for part in parts]
    save_grid(path, np.concatenate(rows), columns=SHOWN)


def _table(rows: list[Row]) -> str:
    """Rows of one name are of several seeds."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for name in dict.fromkeys(row[:2] for row in rows):
        figures = zip(*(row[2:] for row in rows if row[:2] == name))
        lines.append("| " + " | ".join((*name, *map(_spread, figures))) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: Iterable[float | None]) -> str:
    """Mean and range over the seeds."""
    known = [value for value in values if value is not None]
    if not known or np.isinf(known).all():
        return "exact" if known else ""
    return spread(known, ".1f")


if __name__ == "__main__":
    cli.run(main, required=("out",))
