"""The cheap metrics of EMA samples during training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ppflow_jax.autoencoders.decode import Decoder
from ppflow_jax.checkpoints.card import Card
from ppflow_jax.data.images import array_images, source_images
from ppflow_jax.data.pipeline import Source
from ppflow_jax.errors import InputError, RunError
from ppflow_jax.files.disk import atomic
from ppflow_jax.files.store import FOLDER, steps_in
from ppflow_jax.generate.run_pictures import RunPictures
from ppflow_jax.metrics.evaluator import NOT_COMPARABLE, Evaluator, Reference, open_reference
from ppflow_jax.metrics.networks import FeatureNetwork, load_features, save_small
from ppflow_jax.metrics.train_small_network import train_features
from ppflow_jax.models.conditions import Cond
from ppflow_jax.train.experiment import sampler_of

FEATURES = "features"  # folder in the workdir of a network trained for the run
EVALUATIONS = "evaluations"


def make_judge(
    config: ConfigDict,
    card: Card,
    source: Source,
    mesh: Mesh,
    root: Path,
    shown: Callable[[int], Cond],
) -> Callable[[Any, int], dict[str, float]] | None:
    """Function of EMA and step that gives metrics for the log; None with `config.eval.every` 0.

    Without `config.eval.features` the network is a small one, trained on the training data when
    the run starts and kept in its workdir. Every evaluation leaves a JSON with all that made it.
    `shown` is what so many samples are told.

    Raises:
      InputError: settings that do not fit together, before any step is done.
    """
    c = config.eval
    if c.every < 0 or (c.every and c.count < 2):
        raise InputError("config.eval: every must be at least 0 (off), count at least 2")
    if not c.every:
        return None
    if card.space == "latents" and c.decode == "none":
        raise InputError(
            "config.eval judges pictures and this run makes latents: set config.eval.decode to "
            "vae:DIR or taesd:DIR, or config.eval.every=0"
        )
    decoder, settings = Decoder.parse(c.decode, card), sampler_of(config.sample)
    sample = RunPictures(decoder, settings, told=shown(c.count), seed=config.seed, mesh=mesh)
    writes = jax.process_index() == 0
    evaluator = None
    if writes:
        reference = open_reference(c.reference) if c.reference else _of_source(source)
        network = _network(c, source, card.model.num_classes, root)
        evaluator = Evaluator(network, reference, tuple(c.metrics), seed=config.seed)
        (root / EVALUATIONS).mkdir(exist_ok=True)
        inception = evaluator.network.is_inception
        said = f"resize {c.resize}" if inception else f"of a small network, {NOT_COMPARABLE}"
        print(
            f"every {c.every} steps: {', '.join(evaluator.metrics)} of {c.count} EMA samples "
            f"against {reference.name}, features {said}",
            flush=True,
        )

    def judge(ema: Any, step: int) -> dict[str, float]:
        try:
            pictures = sample(ema)
        except RunError as e:
            raise RunError(f"{e}; config.eval.every=0 trains without metrics") from e
        if evaluator is None:
            return {}
        result = evaluator(array_images(f"EMA of step {step}", pictures))
        path = root / EVALUATIONS / f"step_{step:07d}.json"
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
        prefix = "eval" if evaluator.network.is_inception else "eval_small_features"
        return {f"{prefix}/{name}": value for name, value in result["metrics"].items()}

    return judge


def _of_source(source: Source) -> Reference:
    images = source_images(source)
    return Reference(images.name, images)


def _network(c: ConfigDict, source: Source, classes: int, root: Path) -> FeatureNetwork:
    if c.features:
        return load_features(c.features, c.resize)
    folder = root / FEATURES
    if not steps_in(folder / FOLDER):
        save_small(folder, *train_features(source, classes, seed=0))
    return load_features(folder, c.resize)
