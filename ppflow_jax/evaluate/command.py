"""The work of the command `evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from absl import flags

from ppflow_jax.api.run_samples import RunSamples
from ppflow_jax.data.images import ImageSet, open_images
from ppflow_jax.data.sources import ArraySource, arrays, digits
from ppflow_jax.data.table_files import PARQUET
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic, writable_directory
from ppflow_jax.files.place import lexical, place
from ppflow_jax.files.store import check_new
from ppflow_jax.metrics.evaluator import (
    NOT_COMPARABLE,
    Evaluator,
    check_names,
    environment,
    open_reference,
)
from ppflow_jax.metrics.extract import extract, save_statistics
from ppflow_jax.metrics.feature_cache import FeatureCache
from ppflow_jax.metrics.networks import FeatureNetwork, load_features, save_small, small_features
from ppflow_jax.metrics.table import table
from ppflow_jax.metrics.train_small_network import train_features

FLAGS = flags.FLAGS


def judge() -> None:
    """What the flags of the command say."""
    if FLAGS.batch < 1 or (FLAGS.size is not None and FLAGS.size < 1):
        raise InputError("--batch and --size must be at least 1")
    check_names(FLAGS.metrics)
    if FLAGS.train_features:
        _train()
        return
    if FLAGS.samples and FLAGS.checkpoint:
        raise InputError("--samples and --checkpoint are two sets: give one of them")
    if not (FLAGS.samples or FLAGS.checkpoint or FLAGS.statistics_out):
        raise InputError(
            "give --samples or --checkpoint to judge, --statistics_out or --train_features"
        )
    if not FLAGS.features:
        raise InputError(
            "--features is required: the folder of an Inception network (docs/weights.md has the "
            "line that makes it), of a small one (--train_features), or digits"
        )
    # all that can be wrong with the pictures is said before a network is loaded or trained
    samples = open_images(FLAGS.samples, _size_of(FLAGS.samples)) if FLAGS.samples else None
    reference = open_reference(FLAGS.reference, _size_of(FLAGS.reference))
    for images in filter(None, (samples, reference.images)):
        for line in images.notes:
            print(line, flush=True)
    statistics = check_new(FLAGS.statistics_out) if FLAGS.statistics_out else None
    made = _of_checkpoint(FLAGS.checkpoint) if FLAGS.checkpoint else None
    out = _card_path() if samples or made else None
    network = _network()
    if statistics:
        if reference.images is None:
            raise InputError(f"{reference.name} holds statistics already: give images")
        _write_statistics(statistics, reference.images, network)
    if samples or made:
        seed = made.seed if made else FLAGS.seed or 0
        settings = {"batch": FLAGS.batch, "seed": seed, "cache": True}
        evaluator = Evaluator(network, reference, tuple(FLAGS.metrics), **settings)
        if samples:
            result, card = evaluator(samples), _made_by(place(FLAGS.samples))
        else:
            evaluator.check(made.name, made.num, made.shape)
            evaluator.known()  # before the samples, which take longer
            with made.in_folder(out.with_suffix("")) as images:
                result, card = evaluator(images), made.card
                result["samples"]["name"] = made.name
        if card:
            result["samples"]["card"] = card
        _write_json(out, result)
        print(table(result))
        print(f"everything that made it: {out}")


def _size_of(text: str) -> int | None:
    """`--size` for one of the two sets; where only one is a folder, it is meant for that."""
    folders = {t: _is_folder(t) for t in (FLAGS.samples, FLAGS.reference) if t}
    return FLAGS.size if folders.get(text) or not any(folders.values()) else None


def _is_folder(text: str) -> bool:
    return text.endswith(PARQUET) or place(text).is_dir()


def _network() -> FeatureNetwork:
    if FLAGS.features == "digits":
        return small_features(*train_features(digits(), 10, seed=0))
    return load_features(FLAGS.features, FLAGS.resize)


def _of_checkpoint(path: str) -> RunSamples:
    settings = {"num": FLAGS.num, "seed": FLAGS.seed, "decode": FLAGS.decode}
    found = RunSamples(path, plan=FLAGS.plan, **settings)
    for line in filter(None, found.reminders):
        print(line)
    return found


def _labelled(text: str) -> ArraySource:
    if text == "digits":
        return digits()
    return arrays(text)


def _train() -> None:
    target = check_new(FLAGS.train_features)
    source = _labelled(FLAGS.reference)
    classes = int(source.labels.max()) + 1
    config, params, origin = train_features(source, classes, seed=FLAGS.seed or 0)
    save_small(target, config, params, origin)
    print(
        f"feature network of {origin['trained_on']} in {target}: {config.widths[-1]} features, "
        f"{origin['accuracy']:.1%} of {origin['held_out']} held-out images classified; distances "
        f"in it are {NOT_COMPARABLE}"
    )


def _write_statistics(path: Path, images: ImageSet, network: FeatureNetwork) -> None:
    moments = tuple(name for name in ("features", "spatial") if name in network.dimensions)
    cache = FeatureCache.beside(images, network, moments, ())
    found = extract(images, network, moments=moments, batch=FLAGS.batch, cache=cache)
    card = {"dataset": images.name, "shape": images.shape, "features": network.card}
    if FLAGS.size:
        card["crop"] = f"ADM's centre crop to {FLAGS.size}"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_statistics(path, found.statistics, card | environment())
    if cache:
        cache.remove()
    print(f"statistics of {images} in {path}")


def _card_path() -> Path:
    """Where the JSON goes; proves that it can be written there."""
    if FLAGS.out:
        path = place(FLAGS.out)
    else:
        samples = lexical(FLAGS.samples or FLAGS.checkpoint)
        path = samples.with_name(f"{samples.stem or samples.name}.evaluation.json")
    writable_directory(path.parent)
    if path.is_dir():
        raise InputError(f"--out={path} is a folder: name a file")
    return path


def _made_by(samples: Path) -> Any:
    """The card that `sample` left beside an npz or in a folder."""
    card = (samples if samples.is_dir() else samples.parent) / "card.json"
    try:
        return json.loads(card.read_text()) if card.is_file() else None
    except ValueError as error:
        raise InputError(f"cannot read {card} ({error}): mend or remove it") from error


def _write_json(path: Path, result: dict[str, Any]) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
