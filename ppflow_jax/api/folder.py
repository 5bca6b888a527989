"""Samples into a folder, by all processes together; a killed command continues."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from ppflow_jax.api.inputs import Asked, Values, asked, whole
from ppflow_jax.api.model import Model
from ppflow_jax.api.requests import Lines
from ppflow_jax.console import progress
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import check_room, locked
from ppflow_jax.files.place import place
from ppflow_jax.files.store import digest
from ppflow_jax.generate.conditions import digest_of
from ppflow_jax.generate.folder import SHARD, SampleFolder, begun
from ppflow_jax.generate.images import MICROBATCH, Images
from ppflow_jax.generate.plan import Plan, guided_by
from ppflow_jax.generate.provenance import ROUNDING, decoded_by, made_from, origin
from ppflow_jax.models.conditions import Cond
from ppflow_jax.train.ema import reminder_of

Plans = dict[tuple[float, ...] | None, Plan]


@dataclass(frozen=True)
class Request:
    """What images, and what is kept of them.

    Attributes:
      num, labels, seed, noise, conditions, decode, microbatch: as of `Model.sample`.
      lines: instead of the first four, a label, seed and guidance of every picture.
      batch: images in flight, over all devices; changes no image.
      save_latents: also write latents.npy and labels.npy.
      pngs: every image as a PNG; None: up to 1,000 images.
    """

    num: int | None = None
    labels: str = "balanced"
    seed: int = 0
    noise: Float[np.ndarray, "n h w c"] | None = None
    conditions: Values = None
    lines: Lines | None = None
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
    lines = request.lines
    size = math.prod(shape_of_a_picture(model, request.decode))
    if (asked_for := request.num or 0) > 0:  # before anything is made for so many
        check_room(out, asked_for * size, f"{asked_for:,} pictures")
    given = _given(model, request)
    count, told = given.num, given.told
    check_room(out, count * size, f"{count:,} pictures")
    plans = _plans(lines, model, plan)
    whole("batch", request.batch)
    microbatch = _microbatch(place(out), request, count)
    for one in plans.values():
        model.generator(one, request.decode, microbatch)
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
            **_fill(folder, partial(_made, model, plans, request, told, microbatch)),
            **origin(model.weights.path, model.card),
            "decode": request.decode,
        }
        if first:
            folder.finish(given.labels, settings["pngs"], results)
    folder.wait_until_complete()
    seconds, new = results["seconds"], results["images_in_these_seconds"]
    part = "" if new == count else f" for the last {new}"
    done = (
        f"{count} images, {nfe} NFE each, {seconds:.1f} s with compilation{part}, in {folder.path}"
    )
    return [reminder, done] if reminder else [done]


def _given(model: Model, request: Request) -> Asked:
    """How many pictures, and what the model is told about them."""
    num, labels, lines = request.num, request.labels, request.lines
    if lines:
        num, labels = len(lines.lines), ",".join(map(str, lines.labels.tolist()))
    conditions = request.conditions
    if model.config.asked and conditions is None:
        names = ", ".join(c.name for c in model.config.asked)
        raise InputError(
            f"the model's conditions are {names}: give --conditions=FILE.npz or FOLDER"
        )
    return asked(model.card, num, labels, request.seed, request.noise, conditions)


def _microbatch(out: Path, request: Request, count: int) -> int:
    """At most as many as there are images; in a folder that grows as it was when that was begun."""
    found = begun(out)
    there = found[0]["num"] if found else count
    return min(request.microbatch, there if there < count else count)


def shape_of_a_picture(model: Model, decode: str) -> tuple[int, int, int]:
    """Height, width and channels of what is written."""
    height, width, _ = model.config.shape
    if model.card.space == "pixels":
        return model.config.shape
    larger = 1 if decode == "none" else 8
    return larger * height, larger * width, 3


def _settings(
    model: Model, plan: Plan, request: Request, count: int, microbatch: int
) -> dict[str, Any]:
    """Everything that the images depend on; a folder of others is not continued."""
    noise, conditions = request.noise, request.conditions
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
        **({"conditions_sha256": digest_of(conditions)} if conditions else {}),
        "requests_sha256": request.lines.sha256 if request.lines else None,
        "num": count,
        "microbatch": microbatch,
        "device": jax.local_devices()[0].device_kind,
        "jax": jax.__version__,
        "save_latents": request.save_latents,
        "pngs": count <= 1000 if request.pngs is None else request.pngs,
    }


def _plans(lines: Lines | None, model: Model, plan: Plan) -> Plans:
    """The plan of every guidance that lines ask for; under None the one that is given."""
    asked = dict.fromkeys(line.guidance for line in lines.lines) if lines else {}
    plans: Plans = {None: plan}
    for guidance in asked:
        if guidance is None:
            continue
        if plan.config.cfg_until:
            raise InputError("the requests have guidance of their own: leave out --cfg_until")
        plans[guidance] = guided_by(plan, model.card, guidance)
    return plans


def _made(
    model: Model,
    plans: Plans,
    request: Request,
    told: Cond,
    microbatch: int,
    ids: Int[np.ndarray, " k"],
) -> Iterator[Images]:
    """Images with these numbers: in order, or of a shard those of equal guidance in a row."""
    lines = request.lines
    make = partial(model.images, decode=request.decode, microbatch=microbatch, batch=request.batch)
    if lines is None:
        noise = None if request.noise is None else request.noise[ids]
        here = jax.tree.map(lambda x: x[ids], told)
        yield from make(ids, here, noise, plan=plans[None], seed=request.seed)
        return
    for shard in range(0, len(ids), SHARD):
        groups = defaultdict(list)
        for k in ids[shard : shard + SHARD]:
            groups[lines.lines[k].guidance].append(k)
        for guidance, group in groups.items():
            rows, done = np.array(group, np.int32), 0
            first = np.zeros_like(rows)  # image 0 of its seed
            here, seeds = jax.tree.map(lambda x, rows=rows: x[rows], told), lines.seeds[rows]
            for part in make(first, here, plan=plans[guidance], seed=seeds):
                yield part._replace(ids=rows[done : (done := done + len(part.ids))])


def _fill(
    folder: SampleFolder, made: Callable[[Int[np.ndarray, " k"]], Iterator[Images]]
) -> dict[str, Any]:
    """All shards that are missing; process 0 returns when those of the others are there too."""
    start = time.monotonic()
    shards, every = folder.claim(jax.process_index(), jax.process_count()), folder.shards
    count, done = every.count, every.done()
    missing = count - done
    ids = np.array([k for s in shards for k in every.records(s)], np.int32)
    waiting: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    with progress(count, done, "img", "sample") as bar:
        for part in made(ids):
            waiting |= zip(part.ids.tolist(), zip(part.pictures, part.latents))
            while shards and all(k in waiting for k in every.records(shards[0])):
                pictures, latents = zip(*(waiting.pop(k) for k in every.records(shards[0])))
                folder.write(shards.pop(0), np.stack(pictures), np.stack(latents))
            bar.update(every.done() + len(waiting) - bar.n)
        while jax.process_index() == 0 and (there := every.done()) < count:
            time.sleep(0.5)
            bar.update(there - bar.n)
    return {"seconds": time.monotonic() - start, "images_in_these_seconds": missing}
