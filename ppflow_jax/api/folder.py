"""Samples into a folder, by all processes together; a killed command continues."""

from __future__ import annotations

import contextlib
import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from ppflow_jax.api.inputs import count_of, labels_of, seed_of, whole
from ppflow_jax.api.model import Model
from ppflow_jax.console import progress
from ppflow_jax.files.disk import check_room, locked
from ppflow_jax.files.store import digest
from ppflow_jax.generate.folder import SampleFolder, begun
from ppflow_jax.generate.images import MICROBATCH
from ppflow_jax.generate.plan import Plan
from ppflow_jax.generate.provenance import ROUNDING, decoded_by, made_from, origin
from ppflow_jax.train.ema import reminder_of


@dataclass(frozen=True)
class Request:
    """What images, and what is kept of them.

    Attributes:
      num, labels, seed, noise, decode, microbatch: as of `Model.sample`.
      batch: images in flight, over all devices; changes no image.
      save_latents: also write latents.npy and labels.npy.
      pngs: every image as a PNG; None: up to 1,000 images.
    """

    num: int | None = None
    labels: str = "balanced"
    seed: int = 0
    noise: Float[np.ndarray, "n h w c"] | None = None
    decode: str = "none"
    microbatch: int = MICROBATCH
    batch: int = 4 * MICROBATCH
    save_latents: bool = False
    pngs: bool | None = None


def sample_into(out: str | Path, model: Model, plan: Plan, request: Request) -> list[str]:
    """Make the folder `out` (see generate/folder.py) whole, and say how it went.

    Raises:
      InputError: a request that does not fit the model; a folder of other images.
      RunError: images that are not finite, or a full disk.
    """
    count = count_of(request.num, request.labels, request.noise)
    check_room(out, count * _bytes_of_a_picture(model, request.decode), f"{count:,} pictures")
    labels = labels_of(request.labels, count, seed_of(request.seed), model.card)
    whole("batch", request.batch)
    microbatch = _microbatch(Path(out), request, count)
    model.generator(plan, request.decode, microbatch)
    settings = _settings(model, plan, request, count, microbatch)
    folder = SampleFolder(out, settings)
    nfe = plan.nfe or "adaptive"
    if folder.complete:
        folder.tidy()
        return [f"{count} images, {nfe} NFE each, were complete in {folder.path}"]
    for weights in filter(None, (model.weights, plan.weak)):
        jax.block_until_ready(weights.params)  # what is damaged is said before the folder is begun
    reminder = reminder_of(model.weights.path, model.card) if model.weights.which == "ema" else None
    first = jax.process_index() == 0
    folder.start(first)
    with locked(folder.path) if first else contextlib.nullcontext():
        results = {
            "nfe": nfe,
            **_fill(folder, model, plan, request, labels, microbatch),
            **origin(model.weights.path, model.card),
            "decode": request.decode,
        }
        if first:
            folder.finish(labels, settings["pngs"], results)
    folder.wait_until_complete()
    seconds, new = results["seconds"], results["images_in_these_seconds"]
    part = "" if new == count else f" for the last {new}"
    done = (
        f"{count} images, {nfe} NFE each, {seconds:.1f} s with compilation{part}, in {folder.path}"
    )
    return [reminder, done] if reminder else [done]


def _microbatch(out: Path, request: Request, count: int) -> int:
    """At most as many as there are images; in a folder that grows as it was when that was begun."""
    found = begun(out)
    there = found[0]["num"] if found else count
    return min(request.microbatch, there if there < count else count)


def _bytes_of_a_picture(model: Model, decode: str) -> int:
    height, width, channels = model.config.shape
    if model.card.space == "pixels":
        return height * width * channels
    return height * width * 3 * (1 if decode == "none" else 64)  # autoencoders enlarge 8 times


def _settings(
    model: Model, plan: Plan, request: Request, count: int, microbatch: int
) -> dict[str, Any]:
    """Everything that the images depend on; a folder of others is not continued."""
    noise = request.noise
    return {
        **made_from(model.weights, plan),
        "weak_sha256": digest(plan.weak.path) if plan.weak else None,
        "accelerate": asdict(plan.added),
        "dtype": model.dtype,
        **decoded_by(request.decode),
        "rounding": ROUNDING,
        "seed": request.seed,
        "noise_sha256": None if noise is None else hashlib.sha256(noise.tobytes()).hexdigest(),
        "labels": request.labels,
        "num": count,
        "microbatch": microbatch,
        "device": jax.local_devices()[0].device_kind,
        "jax": jax.__version__,
        "save_latents": request.save_latents,
        "pngs": count <= 1000 if request.pngs is None else request.pngs,
    }


def _fill(
    folder: SampleFolder,
    model: Model,
    plan: Plan,
    request: Request,
    labels: Int[np.ndarray, " n"],
    microbatch: int,
) -> dict[str, Any]:
    """All shards that are missing; process 0 returns when those of the others are there too."""
    start = time.monotonic()
    shards, every = folder.claim(jax.process_index(), jax.process_count()), folder.shards
    done = every.done()
    missing = len(labels) - done
    ids = np.array([k for s in shards for k in every.records(s)], np.int32)
    noise = None if request.noise is None else request.noise[ids]
    pictures: list[np.ndarray] = []
    latents: list[np.ndarray] = []
    with progress(len(labels), done, "img", "sample") as bar:
        for part in model.images(
            ids,
            labels[ids],
            noise,
            plan=plan,
            seed=request.seed,
            decode=request.decode,
            microbatch=microbatch,
            batch=request.batch,
        ):
            pictures.extend(part.pictures)
            latents.extend(part.latents)
            while shards and len(pictures) >= (size := len(every.records(shards[0]))):
                folder.write(shards.pop(0), np.stack(pictures[:size]), np.stack(latents[:size]))
                del pictures[:size], latents[:size]
            bar.update(every.done() + len(pictures) - bar.n)
        while jax.process_index() == 0 and (there := every.done()) < len(labels):
            time.sleep(0.5)
            bar.update(there - bar.n)
    return {"seconds": time.monotonic() - start, "images_in_these_seconds": missing}
