"""Boundaries of a pyramid from the power spectrum of the data, before any training.

White noise has power 1 in every mode of an orthonormal Fourier transform. A mode of data with mean
power P is as strong as the noise in x_t = alpha x1 + sigma x0 at the time when alpha^2 P = sigma^2.
A patch of p pixels gives one token every p pixels, which carry frequencies up to 1 / (2 p) cycles a
pixel (Nyquist). So a level may end when what the next one adds, the band between the two limits, is
as strong as the noise: before, it is noise that finer tokens would spend their time on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ppflow_jax.console import table
from ppflow_jax.data.sources import open_source
from ppflow_jax.errors import InputError
from ppflow_jax.files.place import place
from ppflow_jax.flow.path import Flow
from ppflow_jax.pyramid import Pyramid, Stage

MOST = 4096  # examples that are read
Patch = tuple[int, int]


def proposed(data: str, patches: str, path: str = "linear") -> str:
    """A table of the bands, and the pyramid they propose.

    Args:
      data: `digits`, or the folder of a latent cache or of arrays.
      patches: of the levels from coarse to fine, as `4x4,4x2,2x2`, width x height.

    Raises:
      InputError: no data, or patches that do not divide it or do not become finer.
    """
    levels = _patches(patches)
    power = mean_power(_examples(data))
    for patch in levels:
        if power.shape[0] % patch[0] or power.shape[1] % patch[1]:
            size = f"{power.shape[1]}x{power.shape[0]}"
            raise InputError(f"--patches={patches}: {_text(patch)} does not divide {size} examples")
    rows, stages = [["patch", "band's power", "as strong as noise at t"]], []
    for coarse, fine in zip(levels, levels[1:]):
        band = above(coarse, power.shape) & ~above(fine, power.shape)
        strength = float(power[band].mean())
        end = round(_time(strength, Flow(path)), 2)
        rows.append([f"{_text(coarse)} to {_text(fine)}", f"{strength:.3g}", f"{end:.2f}"])
        # A level whose band is past its time when the one before ends has no time of its own.
        if end > (stages[-1].t_end if stages else 0) and end < 1:
            stages.append(Stage(end, coarse))
    pyramid = Pyramid((*stages, Stage(1.0, levels[-1])))
    lines = [table(rows), f"--config.model.pyramid={pyramid}"]
    if gone := len(levels) - len(pyramid):
        lines.append(f"{gone} level(s) left out: their bands rise no later than those before")
    return "\n".join(lines)


def mean_power(examples: Iterator[tuple[Any, float]]) -> Float[np.ndarray, "h w"]:
    """Mean square of every mode over examples and channels.

    Args:
      examples: (batches [b, h, w, c], power of white noise that is added to them).
    """
    total, count = 0.0, 0
    for x, noise in examples:
        modes = np.fft.fft2(np.float64(x), axes=(1, 2), norm="ortho")
        total = total + np.sum(np.abs(modes) ** 2 + noise, axis=(0, 3))
        count += x.shape[0] * x.shape[3]
    return total / count


def above(patch: Patch, shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Modes that one token a patch cannot carry: above its Nyquist frequency along an axis."""
    high = [np.abs(np.fft.fftfreq(n)) > 0.5 / p + 1e-9 for n, p in zip(shape, patch)]
    return high[0][:, None] | high[1][None, :]


def _time(power: float, flow: Flow) -> float:
    times = np.linspace(*flow.sample_interval(), 20_001)
    alpha, sigma = (np.float64(f(times)) for f in (flow.interpolant.alpha, flow.interpolant.sigma))
    return float(times[np.searchsorted(alpha**2 * power - sigma**2, 0.0)])


def _examples(data: str) -> Iterator[tuple[np.ndarray, float]]:
    folder = place(data)
    if data == "digits":
        source = open_source("digits", "")
    elif (folder / "latents.npy").exists():
        source = open_source("arrays", data)
    elif folder.is_dir():
        source = open_source("cache", data)
    else:
        raise InputError(
            f"--data={data}: write digits, or the folder of a latent cache or of latents.npy"
        )
    every = np.unique(np.linspace(0, len(source) - 1, min(MOST, len(source))).astype(int))
    for part in np.array_split(every, -(-len(every) // 256)):
        found = source.read(part, np.zeros(len(part), bool))
        if "x" in found:
            yield found["x"], 0.0
        else:
            yield found["mean"], float(np.mean(np.square(found["std"])))


def _patches(text: str) -> Sequence[Patch]:
    ends = text.replace(" ", "").split(",")
    whole = ",".join(f"{p}@{(i + 1) / len(ends)}" for i, p in enumerate(ends))
    try:
        patches = [stage.patch for stage in Pyramid.parse(whole).stages]
    except InputError as e:
        raise InputError(f"--patches={text}: write WIDTHxHEIGHT, e.g. 4x4,2x2") from e
    finer = all(a != b and a[0] >= b[0] and a[1] >= b[1] for a, b in zip(patches, patches[1:]))
    if len(patches) < 2 or not finer:
        raise InputError(f"--patches={text}: give two or more, each finer than the one before")
    return patches


def _text(patch: Patch) -> str:
    return f"{patch[1]}x{patch[0]}"
