"""Judge samples: python -m ppflow_jax.evaluate --samples=FILE.npz --reference=DIR --features=DIR

    python -m ppflow_jax.evaluate --checkpoint=DIR --num=10000 --reference=DIR --features=DIR
    python -m ppflow_jax.evaluate --reference=DIR --features=DIR --statistics_out=FILE.npz
    python -m ppflow_jax.evaluate --reference=digits --train_features=DIR

The second samples first, as the run's configuration does. The third keeps the statistics of a
dataset, the last trains a small feature network on one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from absl import flags

from ppflow_jax import cli
from ppflow_jax.api.run_samples import RunSamples
from ppflow_jax.data.images import ImageSet, open_images
from ppflow_jax.data.sources import ArraySource, arrays, digits
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic, writable_directory
from ppflow_jax.files.store import check_new
from ppflow_jax.metrics.evaluator import (
    METRICS,
    NOT_COMPARABLE,
    Evaluator,
    environment,
    open_reference,
)
from ppflow_jax.metrics.extract import extract, save_statistics
from ppflow_jax.metrics.networks import FeatureNetwork, load_features, save_small, small_features
from ppflow_jax.metrics.resize import CONVENTIONS
from ppflow_jax.metrics.table import table
from ppflow_jax.metrics.train_small_network import train_features

_SAMPLES = flags.DEFINE_string("samples", None, "npz with arr_0, folder of images, or digits.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir or step to sample from instead.")
_NUM = flags.DEFINE_integer("num", 10_000, "Samples of --checkpoint, its classes in turn.")
_DECODE = flags.DEFINE_string("decode", "none", "vae:DIR or taesd:DIR for a model of latents.")
_REFERENCE = flags.DEFINE_string(
    "reference", None, "The same, or an npz with mu and sigma: what samples are compared with."
)
_FEATURES = flags.DEFINE_string(
    "features",
    None,
    "Folder of an Inception (docs/weights.md) or of --train_features; digits: trained on the spot.",
)
_METRICS = flags.DEFINE_list(
    "metrics", [], f"Of {', '.join(METRICS)}; default: all that can be had."
)
_RESIZE = flags.DEFINE_enum(
    "resize", "tf1", CONVENTIONS, "To 299x299, as ADM's evaluator or as pytorch-fid."
)
_SIZE = flags.DEFINE_integer("size", None, "ADM's centre crop of the images in folders.")
_OUT = flags.DEFINE_string("out", None, "JSON file; default: beside the samples.")
_STATISTICS_OUT = flags.DEFINE_string(
    "statistics_out", None, "Write mean and covariance of the reference to this new npz."
)
_TRAIN_FEATURES = flags.DEFINE_string(
    "train_features", None, "Train a feature network on the labelled reference, in this new folder."
)
_BATCH = flags.DEFINE_integer("batch", 64, "Images at once, over all devices.")
_SEED = flags.DEFINE_integer(
    "seed", None, "Of samples, KID's subsets, --train_features; default: the run's, or 0."
)


def main() -> None:
    if _BATCH.value < 1 or (_SIZE.value is not None and _SIZE.value < 1):
        raise InputError("--batch and --size must be at least 1")
    if _TRAIN_FEATURES.value:
        _train()
        return
    if _SAMPLES.value and _CHECKPOINT.value:
        raise InputError("--samples and --checkpoint are two sets: give one of them")
    if not (_SAMPLES.value or _CHECKPOINT.value or _STATISTICS_OUT.value):
        raise InputError(
            "give --samples or --checkpoint to judge, --statistics_out or --train_features"
        )
    if not _FEATURES.value:
        raise InputError(
            "--features is required: the folder of an Inception network (docs/weights.md has the "
            "line that makes it), of a small one (--train_features), or digits"
        )
    # all that can be wrong with the pictures is said before a network is loaded or trained
    samples = open_images(_SAMPLES.value, _size_of(_SAMPLES.value)) if _SAMPLES.value else None
    reference = open_reference(_REFERENCE.value, _size_of(_REFERENCE.value))
    for images in filter(None, (samples, reference.images)):
        for line in images.notes:
            print(line, flush=True)
    statistics = check_new(_STATISTICS_OUT.value) if _STATISTICS_OUT.value else None
    made = _of_checkpoint(_CHECKPOINT.value) if _CHECKPOINT.value else None
    out = _card_path() if samples or made else None
    network = _network()
    if statistics:
        if reference.images is None:
            raise InputError(f"{reference.name} holds statistics already: give images")
        _write_statistics(statistics, reference.images, network)
    if samples or made:
        seed = made.seed if made else _SEED.value or 0
        evaluator = Evaluator(
            network, reference, tuple(_METRICS.value), batch=_BATCH.value, seed=seed
        )
        result = evaluator(samples or made.images())
        card = _made_by(Path(_SAMPLES.value)) if samples else made.card
        if card:
            result["samples"]["card"] = card
        _write_json(out, result)
        print(table(result))
        print(f"everything that made it: {out}")


def _size_of(text: str) -> int | None:
    """`--size` for one of the two sets; where only one is a folder, it is meant for that."""
    folders = [Path(t).is_dir() for t in (_SAMPLES.value, _REFERENCE.value) if t]
    return _SIZE.value if Path(text).is_dir() or not any(folders) else None


def _network() -> FeatureNetwork:
    if _FEATURES.value == "digits":
        return small_features(*train_features(digits(), 10, seed=0))
    return load_features(_FEATURES.value, _RESIZE.value)


def _of_checkpoint(path: str) -> RunSamples:
    found = RunSamples(path, num=_NUM.value, seed=_SEED.value, decode=_DECODE.value)
    if found.reminder:
        print(found.reminder)
    return found


def _labelled(text: str) -> ArraySource:
    if text == "digits":
        return digits()
    return arrays(text)


def _train() -> None:
    target = check_new(_TRAIN_FEATURES.value)
    source = _labelled(_REFERENCE.value)
    classes = int(source.labels.max()) + 1
    config, params, origin = train_features(source, classes, seed=_SEED.value or 0)
    save_small(target, config, params, origin)
    print(
        f"feature network of {origin['trained_on']} in {target}: {config.widths[-1]} features, "
        f"{origin['accuracy']:.1%} of {origin['held_out']} held-out images classified; distances "
        f"in it are {NOT_COMPARABLE}"
    )


def _write_statistics(path: Path, images: ImageSet, network: FeatureNetwork) -> None:
    moments = tuple(name for name in ("features", "spatial") if name in network.dimensions)
    found = extract(images, network, moments=moments, batch=_BATCH.value)
    card = {"dataset": images.name, "shape": images.shape, "features": network.card}
    if _SIZE.value:
        card["crop"] = f"ADM's centre crop to {_SIZE.value}"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_statistics(path, found.statistics, card | environment())
    print(f"statistics of {images} in {path}")


def _card_path() -> Path:
    """Where the JSON goes; proves that it can be written there."""
    if _OUT.value:
        path = Path(_OUT.value)
    else:
        samples = Path(os.path.abspath(_SAMPLES.value or _CHECKPOINT.value))
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


if __name__ == "__main__":
    cli.run(main, required=("reference",))
