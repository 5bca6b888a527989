"""What a person sees of a run: progress bar, metric files, image grids, loss plot."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from tqdm import tqdm

from ppflow_jax.data import transforms
from ppflow_jax.files import atomic


def progress(total: int, done: int, unit: str, what: str) -> tqdm:
    """Progress bar with rate and ETA on stderr of process 0; sparse when stderr is a file."""
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        desc=what,
        dynamic_ncols=True,
        disable=jax.process_index() != 0,
        mininterval=0.2 if sys.stderr.isatty() else 30,
    )


def say(line: str) -> None:
    """A line on stderr, above a progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)


class MetricWriter:
    """Scalars to `metrics.jsonl` and to TensorBoard event files.

    On resume, lines of steps after `step` are dropped, so that the file is that of one run. Only
    process 0 reads and writes.
    """

    def __init__(self, workdir: Path, step: int):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self.path = workdir / "metrics.jsonl"
        kept = [r for r in read_metrics(self.path) if r["step"] <= step]
        with atomic(self.path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
        self._file = self.path.open("a")
        self._events = EventFileWriter(str(workdir / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if not self._writes:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        summary = [Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        self._events.add_event(Event(step=step, summary=Summary(value=summary)))

    def close(self) -> None:
        if self._writes:
            self._file.close()
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, int | float]]:
    """Rows of a `metrics.jsonl`; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def to_uint8(images: Float[np.ndarray, "b h w c"], space: str) -> UInt8[np.ndarray, "b h w k"]:
    """Pictures of model outputs, by the rounding of `transforms.to_uint8`.

    Latents have no colours: their first three channels are shown, [-3, 3] to 0..255.
    """
    if space == "latents":
        images = images[..., :3] / 3
    if images.shape[-1] not in (1, 3):
        images = images[..., :1]
    return transforms.to_uint8(images)


def save_png(path: Path, image: UInt8[np.ndarray, "h w c"]) -> None:
    """One picture, grey or RGB."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    with atomic(path) as temporary:
        picture.save(temporary, format="png")


def save_grid(path: Path, images: UInt8[np.ndarray, "b h w c"], columns: int) -> None:
    """Pictures in rows of `columns`, enlarged to about 64 pixels if they are small."""
    zoom = max(1, 64 // images.shape[1])
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    images = np.pad(images, ((0, -len(images) % columns), (1, 1), (1, 1), (0, 0)))
    b, h, w, c = images.shape
    grid = images.reshape(b // columns, columns, h, w, c).swapaxes(1, 2)
    save_png(path, grid.reshape(b // columns * h, columns * w, c))


def save_loss_plot(path: Path, rows: list[dict[str, int | float]]) -> None:
    """Loss over steps, total and by stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    names = sorted({k for r in rows for k in r if k.startswith("loss")})
    for name in names:
        points = [(r["step"], r[name]) for r in rows if name in r]
        axes.plot(*zip(*points), label=name, linewidth=2 if name == "loss" else 1)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    if names:
        axes.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
