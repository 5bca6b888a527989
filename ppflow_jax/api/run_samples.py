"""Samples of a run to judge it by, with the settings of its own configuration."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ppflow_jax.api.folder import Request, sample_into, shape_of_a_picture
from ppflow_jax.api.inputs import check_unconditional, labels_of, seed_of
from ppflow_jax.api.model import Model
from ppflow_jax.checkpoints.weights import open_weights
from ppflow_jax.console import progress
from ppflow_jax.data.images import ImageSet, array_images, open_images
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import remove_tree
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.generate.folder import CARD
from ppflow_jax.generate.images import MICROBATCH
from ppflow_jax.generate.plan import make_plan
from ppflow_jax.generate.provenance import ROUNDING, decoded_by, made_from, origin
from ppflow_jax.train.ema import reminder_of
from ppflow_jax.train.experiment import sampler_of


class RunSamples:
    """The first `num` pictures of a checkpoint's EMA, the trained classes in turn.

    Args:
      plan: file of `ppflow tune` instead of the run's own settings.

    Attributes:
      seed: of the noise; the run's, unless another is given.
      card: what makes the pictures, and when they are made how it went.
      name: what is sampled, in a few words.
      shape: of a picture.
      reminders: lines about the plan, and an average that is still too much of its first weights.

    Raises:
      InputError: no such checkpoint, a model of latents without a decoder.
    """

    def __init__(
        self, path: str, *, num: int, seed: int | None, decode: str, plan: str | None = None
    ):
        if num < 2:
            raise InputError(f"--num must be at least 2, got {num}")
        weights = open_weights(path)
        card, run = weights.card, weights.card.experiment
        if card.space == "latents" and decode == "none":
            raise InputError(f"{path} makes latents: give --decode=vae:DIR or taesd:DIR")
        check_unconditional(card.model, "this command")
        self.name = f"{num} of {weights.path}"
        self.num, self.decode, self.microbatch = num, decode, min(MICROBATCH, num)
        self.seed = seed_of((run["seed"] if run else 0) if seed is None else seed)
        self.model = Model(weights)
        if plan:
            self.plan = self.model.plan(plan)
        else:
            self.plan = make_plan(card, sampler_of(run["sample"]) if run else SamplerConfig())
        self.model.generator(self.plan, decode, self.microbatch)
        self.shape = shape_of_a_picture(self.model, decode)
        self.reminders = (*self.plan.notes, reminder_of(weights.path, card) or "")
        self.card: dict[str, Any] = {
            "settings": {
                **made_from(weights, self.plan),
                **decoded_by(decode),
                "rounding": ROUNDING,
                "seed": self.seed,
                "labels": "balanced",
                "num": num,
                "microbatch": self.microbatch,
            },
            "nfe": self.plan.nfe or "adaptive",
            **origin(weights.path, card),
        }

    def images(self) -> ImageSet:
        """
        Raises:
          RunError: an image is not finite.
        """
        start, pictures = time.monotonic(), []
        labels = labels_of("balanced", self.num, self.seed, self.model.card)
        parts = self.model.images(
            np.arange(self.num),
            labels,
            plan=self.plan,
            seed=self.seed,
            decode=self.decode,
            microbatch=self.microbatch,
        )
        with progress(self.num, 0, "img", "sample") as bar:
            for part in parts:
                pictures.append(part.pictures)
                bar.update(len(part.ids))
        seconds = time.monotonic() - start
        self.card |= {"seconds": seconds, "images_in_these_seconds": self.num}
        return array_images(self.name, np.concatenate(pictures))

    @contextmanager
    def in_folder(self, path: Path) -> Iterator[ImageSet]:
        """The same in a folder PATH.samples-KEY, where a killed command continues.

        It is removed when the block succeeds.

        Raises:
          RunError: an image is not finite, or the disk is full.
        """
        key = hashlib.sha256(json.dumps(self.card["settings"]).encode()).hexdigest()[:12]
        folder = path.with_name(f"{path.name}.samples-{key}")
        request = Request(self.num, seed=self.seed, decode=self.decode, pngs=False)
        sample_into(folder, self.model, self.plan, request)
        card = json.loads((folder / CARD).read_text())
        self.card |= {k: card[k] for k in ("seconds", "images_in_these_seconds")}
        yield open_images(str(folder))
        remove_tree(folder)
