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
import time
from pathlib import Path
from typing import Any

from absl import flags

from ppflow_jax import cli
from ppflow_jax.autoencoders.decode import Decoder
from ppflow_jax.checkpoints.card import read_card
from ppflow_jax.checkpoints.weights import load_weights
from ppflow_jax.console import progress
from ppflow_jax.data.images import ImageSet, array_images, open_images
from ppflow_jax.data.sources import ArraySource, arrays, digits
from ppflow_jax.devices.sharding import local_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic, writable_directory
from ppflow_jax.files.store import check_new, find_checkpoint
from ppflow_jax.flow.plan import SamplerConfig
from ppflow_jax.generate.provenance import ROUNDING, decoded_by, made_from, origin
from ppflow_jax.generate.run_pictures import RunPictures
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
from ppflow_jax.metrics.train_small_network import train_features
from ppflow_jax.train.ema import reminder_of
from ppflow_jax.train.experiment import sampler_of

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

_SHOWN = {
    "fid": "FID",
    "sfid": "sFID",
    "is": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID",
}


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
    model = _Model(_CHECKPOINT.value) if _CHECKPOINT.value else None
    out = _card_path() if samples or model else None
    network = _network()
    if statistics:
        if reference.images is None:
            raise InputError(f"{reference.name} holds statistics already: give images")
        _write_statistics(statistics, reference.images, network)
    if samples or model:
        seed = model.seed if model else _SEED.value or 0
        evaluator = Evaluator(
            network, reference, tuple(_METRICS.value), batch=_BATCH.value, seed=seed
        )
        result = evaluator(samples or model.generate())
        card = _made_by(Path(_SAMPLES.value)) if samples else model.card
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


class _Model:
    """A checkpoint to sample from, with the settings of its run's `config.sample`.

    Raises:
      InputError: no such checkpoint, a model of latents without --decode.
    """

    def __init__(self, path: str):
        folder = find_checkpoint(path)
        card = read_card(folder)
        if _NUM.value < 2:
            raise InputError(f"--num must be at least 2, got {_NUM.value}")
        if card.space == "latents" and _DECODE.value == "none":
            raise InputError(f"{path} makes latents: give --decode=vae:DIR or taesd:DIR")
        run = card.experiment
        config = sampler_of(run["sample"]) if run else SamplerConfig()
        self.seed = (run["seed"] if run else 0) if _SEED.value is None else _SEED.value
        decoder, mesh = Decoder.parse(_DECODE.value, card), local_mesh()
        self._pictures = RunPictures(decoder, config, count=_NUM.value, seed=self.seed, mesh=mesh)
        self._params = load_weights(folder, card, mesh)
        if line := reminder_of(folder, card):
            print(line)
        self.card = {
            "settings": {
                **made_from(folder, "ema", self._pictures.sampler, card.model.pyramid),
                **decoded_by(_DECODE.value),
                "rounding": ROUNDING,
                **self._pictures.settings,
            },
            "nfe": self._pictures.nfe,
            **origin(folder, card),
        }

    def generate(self) -> ImageSet:
        start = time.monotonic()
        with progress(_NUM.value, 0, "img", "sample") as bar:
            pictures = self._pictures(self._params, bar.update)
        seconds = time.monotonic() - start
        self.card |= {"seconds": seconds, "images_in_these_seconds": _NUM.value}
        return array_images(f"{_NUM.value} of {self.card['checkpoint']}", pictures)


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


def table(result: dict[str, Any]) -> str:
    """What a person reads of an evaluation."""
    samples, reference, network = (result[k] for k in ("samples", "reference", "features"))
    size = "x".join(map(str, samples["shape"]))
    known = f"{reference['count']:,} images" if "count" in reference else "statistics of the file"
    if network["network"] == "inception":
        made = f"Inception {network['digest']}, resize {network['resize']}"
    else:
        made = f"small network {network['digest']} trained on {network['trained_on']}"
    rows = [
        ("samples", f"{samples['name']}: {samples['count']:,} images of {size}"),
        ("reference", f"{reference['name']}: {known}"),
        ("features", made),
    ]
    values = result["metrics"]
    for metric, value in values.items():
        if metric in _SHOWN:
            spread = ""
            if metric == "kid":
                size, subsets = (result["settings"][k] for k in ("kid_subset_size", "kid_subsets"))
                spread = f" ± {values['kid_std']:.5f} ({subsets} subsets of {size:,})"
            rows.append((_SHOWN[metric], f"{value:.5f}{spread}"))
    rows += [(f"no {_SHOWN[m]}", why) for m, why in result["left_out"].items()]
    rows += [("note", note) for note in result["notes"]]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


if __name__ == "__main__":
    cli.run(main, required=("reference",))
