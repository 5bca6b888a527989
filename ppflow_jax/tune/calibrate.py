"""What plans are fitted to: fine trajectories of a model under its guidance, kept on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from ppflow_jax.api.model import Model
from ppflow_jax.api.plans import sha256_of
from ppflow_jax.console import progress
from ppflow_jax.errors import InputError, RunError
from ppflow_jax.files.arrays import load_array
from ppflow_jax.files.disk import atomic, writable_directory
from ppflow_jax.files.place import place
from ppflow_jax.flow.sampler import image_noise

PART = 64  # trajectories that are made, and kept, at once
FINE = 100  # Heun steps


@dataclass(frozen=True)
class Setting:
    """What is calibrated.

    Attributes:
      cfg: guidance scale of every stage.
      noises: trajectories that plans are fitted to; half as many more are held out.
      finest: with the finest patch at all times, instead of that of the model's stages.
    """

    cfg: tuple[float, ...]
    cfg_channels: int = 0
    noises: int = 256
    seed: int = 0
    finest: bool = False

    def __post_init__(self):
        if self.noises < 8:
            raise InputError(f"--noises={self.noises}: give at least 8 trajectories to fit to")


@dataclass(frozen=True)
class Trajectories:
    """Fine trajectories.

    Attributes:
      times: of the states; every stage boundary is one.
      states: from noise to data.
    """

    times: Float[np.ndarray, " points"]
    states: Float[np.ndarray, "points n h w c"]
    labels: Int[np.ndarray, " n"]

    def at(self, times: Float[np.ndarray, " k"]) -> Float[np.ndarray, "k n h w c"]:
        """States at other times, between two points along a line."""
        place = np.clip(np.searchsorted(self.times, times, side="right") - 1, 0, len(self) - 2)
        width = self.times[place + 1] - self.times[place]
        share = ((times - self.times[place]) / width)[:, None, None, None, None]
        states = self.states[place] * (1 - share) + self.states[place + 1] * share
        return states.astype(self.states.dtype)

    def __len__(self) -> int:
        return len(self.times)

    def part(self, rows: slice) -> Trajectories:
        return Trajectories(self.times, self.states[:, rows], self.labels[rows])


def calibrated(
    model: Model, setting: Setting, folder: str | Path
) -> tuple[Trajectories, Trajectories]:
    """Trajectories to fit to, and others that are held out; made once and read again.

    A killed call continues from its finished parts.

    Raises:
      InputError: a folder that cannot be written.
      RunError: states that are not finite.
    """
    known = {**asdict(setting), "fine": FINE, "checkpoint_sha256": sha256_of(model.weights)}
    if not known["finest"]:
        del known["finest"]  # so that what was made before there was another is found
    known |= {"weights": model.weights.which, "dtype": model.dtype, "jax": jax.__version__}
    name = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]
    target = writable_directory(place(folder) / f"calibration-{name}")
    every = setting.noises + setting.noises // 2
    labels = np.resize(model.card.classes.trained(model.config.num_classes), every)
    plan = model.plan(steps=FINE, solver="heun", cfg=setting.cfg, cfg_channels=setting.cfg_channels)
    if setting.finest:
        last = len(model.config.pyramid) - 1
        segments = [replace(s, stages=(last,) * len(s.stages)) for s in plan.segments]
        plan = replace(plan, segments=tuple(segments))
    parts = []
    with progress(every, 0, "img", "calibrate") as bar:
        for first in range(0, every, PART):
            file, last = target / f"{first:06d}.npy", min(first + PART, every)
            if not file.exists():
                ids = np.arange(first, last)
                noise, _ = image_noise(np.uint32(setting.seed), ids, model.config.shape)
                states = model.trajectory(plan=plan, labels=labels[first:last], noise=noise)
                if not np.isfinite(states).all():
                    raise RunError(
                        "a calibration trajectory is not finite: the weights may have diverged; "
                        "try --dtype=float32 or a lower --cfg"
                    )
                with atomic(file) as temporary, temporary.open("wb") as handle:
                    np.save(handle, states)
            parts.append(_read(file, (len(plan.times), last - first, *model.config.shape)))
            bar.update(last - first)
    found = Trajectories(np.float64(plan.times), np.concatenate(parts, axis=1), labels)
    return found.part(slice(0, setting.noises)), found.part(slice(setting.noises, None))


def _read(file: Path, shape: tuple[int, ...]) -> Float[np.ndarray, "points n h w c"]:
    try:
        states = load_array(file)
        if states.shape != shape or states.dtype != np.float32 or not np.isfinite(states).all():
            raise ValueError(f"{states.dtype} {states.shape}, not float32 {shape}")
    except (OSError, ValueError, EOFError) as e:
        raise InputError(f"{file} is damaged ({e}): remove it, and it is made again") from e
    return states


def grid_of(model: Model, counts: tuple[int, ...]) -> Float[np.ndarray, " points"]:
    """Times with so many equal steps in every stage, float64."""
    lo, hi = model.card.flow.sample_interval()
    ends = (lo, *model.config.pyramid.boundaries, hi)
    pieces = [np.linspace(a, b, n + 1)[:-1] for a, b, n in zip(ends, ends[1:], counts)]
    return np.float64(np.float32(np.concatenate([*pieces, [hi]])))
