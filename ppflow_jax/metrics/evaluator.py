"""FID and its relatives of a set of pictures, with everything that made the numbers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from ppflow_jax.data.images import ImageSet, npz_images, open_images
from ppflow_jax.errors import InputError
from ppflow_jax.files.copies import given
from ppflow_jax.files.place import place
from ppflow_jax.metrics.extract import Extracted, check_shape, extract, read_statistics
from ppflow_jax.metrics.feature_cache import FeatureCache
from ppflow_jax.metrics.frechet import frechet_distance
from ppflow_jax.metrics.inception_score import SPLIT_SIZE, inception_scores
from ppflow_jax.metrics.kid import SUBSET_SIZE, SUBSETS, kid_of_subsets, subset_indices
from ppflow_jax.metrics.moments import Statistics
from ppflow_jax.metrics.networks import FeatureNetwork
from ppflow_jax.metrics.precision_recall import NEIGHBOURS, precision_recall

METRICS = ("fid", "sfid", "is", "precision", "recall", "kid")
NOT_COMPARABLE = "not comparable with Inception FID"
_MOMENTS = {"fid": "features", "sfid": "spatial"}
_PAIRS = ("precision", "recall", "kid")  # need the single features of both sets
PACKAGES = ("ppflow_jax", "jax", "jaxlib", "flax", "numpy", "pillow")


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: pictures, statistics, or both (ADM's reference batches)."""

    name: str
    images: ImageSet | None = None
    statistics: dict[str, Statistics] = field(default_factory=dict)
    card: dict[str, Any] | None = None


def open_reference(text: str, size: int | None = None) -> Reference:
    """An npz with `mu`, `sigma` and perhaps `mu_s`, `sigma_s`, `arr_0`; or see `open_images`.

    Raises:
      InputError: see `open_images` and `read_statistics`.
    """
    path = place(text)
    if not path.is_file():
        images = open_images(text, size)
        return Reference(images.name, images)
    path = given(text)
    statistics, card = read_statistics(path)
    if not statistics:
        return Reference(text, npz_images(path))
    with np.load(path) as file:
        images = npz_images(path) if "arr_0" in file.files else None
    return Reference(text, images, statistics, card)


class Evaluator:
    """Compares any number of sample sets with one reference, whose features are computed once.

    `metrics` are some of `METRICS`; empty: all that network and reference allow.

    Raises:
      InputError: metrics that they do not allow, statistics of another network.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        reference: Reference,
        metrics: tuple[str, ...] = (),
        *,
        batch: int = 64,
        seed: int = 0,
        cache: bool = False,
    ):
        """
        Args:
          cache: keep features in files beside the pictures: those of the reference for good,
            those of samples until they are judged.
        """
        self.network, self.reference, self.batch, self.seed = network, reference, batch, seed
        self.cache = cache
        check_names(metrics)
        _check_statistics(reference, network)
        if reference.images:
            check_shape(reference.name, reference.images.shape, network)
        self.left_out = {m: why for m in METRICS if (why := self._impossible(m))}
        if wrong := [m for m in metrics if m in self.left_out]:
            raise InputError("; ".join(f"no {m}: {self.left_out[m]}" for m in wrong))
        self.metrics = tuple(m for m in METRICS if m in (metrics or METRICS))
        self.metrics = tuple(m for m in self.metrics if m not in self.left_out)
        self.left_out = {} if metrics else self.left_out
        self._moments = tuple(_MOMENTS[m] for m in self.metrics if m in _MOMENTS)
        self._pairs = any(m in _PAIRS for m in self.metrics)
        self._known: Extracted | None = None
        self._reference_cache: FeatureCache | None = None

    def _impossible(self, metric: str) -> str | None:
        """Why network and reference do not allow it."""
        needed = {"sfid": "spatial", "is": "logits"}.get(metric, "features")
        if needed not in self.network.dimensions:
            if not self.network.is_inception:
                return "this feature network has no spatial features"
            return (
                "these Inception weights have no last layer (convert pytorch-fid's "
                "pt_inception-2015-12-05 file)"
            )
        if metric in _PAIRS and not self.reference.images:
            return f"{self.reference.name} has statistics only, this needs images"
        if metric in _MOMENTS and not self.reference.images:
            found = self.reference.statistics.get(needed)
            if found is None:
                return f"{self.reference.name} has no statistics of {needed} features"
        return None

    def known(self) -> Extracted:
        """Of the reference; statistics of the file come before those of its pictures, as in ADM."""
        if self._known is None:
            reference = self.reference
            missing = tuple(m for m in self._moments if m not in reference.statistics)
            keep = ("features",) if self._pairs else ()
            found = Extracted()
            if missing or keep:
                found, self._reference_cache = self._extract(reference.images, missing, keep)
            self._known = Extracted(found.statistics | reference.statistics, found.kept)
        return self._known

    def _extract(
        self, images: ImageSet, moments: tuple[str, ...], keep: tuple[str, ...]
    ) -> tuple[Extracted, FeatureCache | None]:
        """Features, and the file that they are kept in."""
        cache = FeatureCache.beside(images, self.network, moments, keep) if self.cache else None
        options = {"moments": moments, "keep": keep, "batch": self.batch, "cache": cache}
        return extract(images, self.network, **options), cache

    def check(self, name: str, count: int, shape: tuple[int, ...]) -> None:
        """What can be known of samples before any feature is computed, or any sample made.

        Raises:
          InputError: a size that the network does not take, too few pictures.
        """
        check_shape(name, shape, self.network)
        sets = [(name, count)]
        if images := self.reference.images:
            sets.append((images.name, images.count))
        least = NEIGHBOURS + 1 if {"precision", "recall"} & set(self.metrics) else 2
        for what, number in sets:
            if number < least:
                raise InputError(
                    f"{what} ({number:,} images): these metrics need at least {least} images"
                )

    def __call__(self, samples: ImageSet) -> dict[str, Any]:
        """Metrics and what made them, ready for JSON.

        Raises:
          InputError: see `check` and `extract`.
        """
        start = time.monotonic()
        self.check(samples.name, samples.count, samples.shape)
        reference = self.known()
        keep = (("features",) if self._pairs else ()) + (
            ("logits",) if "is" in self.metrics else ()
        )
        found, cache = self._extract(samples, self._moments, keep)
        values, ranks, settings = {}, {}, {}
        for metric in set(self.metrics) & set(_MOMENTS):
            name = _MOMENTS[metric]
            values[metric], ranks[metric] = frechet_distance(
                reference.statistics[name], found.statistics[name]
            )
        if "is" in self.metrics:
            values["is"] = float(inception_scores(found.kept["logits"]).mean())
            settings["is_split_size"] = SPLIT_SIZE
        if self._pairs:
            x, y = reference.kept["features"], found.kept["features"]
        if {"precision", "recall"} & set(self.metrics):
            values["precision"], values["recall"], *_ = precision_recall(x, y)
            settings["neighbours"] = NEIGHBOURS
        if "kid" in self.metrics:
            size = min(SUBSET_SIZE, len(x), len(y))
            rows = subset_indices(len(x), len(y), size=size, seed=self.seed)
            values["kid"], values["kid_std"] = kid_of_subsets(x, y, *rows)
            settings |= {"kid_subsets": SUBSETS, "kid_subset_size": size, "kid_seed": self.seed}
        if cache and cache != self._reference_cache:  # a set may be compared with itself
            cache.remove()
        shown = {m: values[m] for m in (*METRICS, "kid_std") if m in values}
        shown = {m: v for m, v in shown.items() if m.removesuffix("_std") in self.metrics}
        return {
            "metrics": shown,
            "notes": self._notes(samples, ranks, found, reference),
            "left_out": self.left_out,
            "samples": {"name": samples.name, "count": samples.count, "shape": samples.shape},
            "reference": self._reference_card(),
            "features": self.network.card | {"dimensions": self.network.dimensions},
            "covariance_ranks": {m: {"reference": r[0], "samples": r[1]} for m, r in ranks.items()},
            "settings": settings | {"batch": self.batch},
            **environment(),
            "seconds": round(time.monotonic() - start, 1),
        }

    def _reference_card(self) -> dict[str, Any]:
        card: dict[str, Any] = {"name": self.reference.name}
        if images := self.reference.images:
            card |= {"count": images.count, "shape": images.shape}
        used = [m for m in self._moments if m in self.reference.statistics]
        return card | (
            {"statistics_of_the_file": used, "file": self.reference.card} if used else {}
        )

    def _notes(self, samples, ranks, found: Extracted, reference: Extracted) -> list[str]:
        """What a reader must know before comparing these numbers with others."""
        notes = []
        if not self.network.is_inception:
            notes.append(
                f"features of a small network trained on {self.network.card['trained_on']}: "
                f"{NOT_COMPARABLE}, only between runs judged by the network with this digest"
            )
        for metric, pair in ranks.items():
            name = _MOMENTS[metric]
            dimension = self.network.dimensions[name]
            counts = reference.statistics[name].count, found.statistics[name].count
            for what, rank, count in zip(("reference", "samples"), pair, counts):
                if 0 < count <= dimension:
                    notes.append(
                        f"{metric}: the {what} are {count:,} images for {dimension:,} features, "
                        f"the covariance is singular (rank {rank:,}): the number is far above the "
                        "one of many images, compare it only at equal counts"
                    )
                elif rank < dimension:
                    notes.append(
                        f"{metric}: the covariance of the {what} is singular (rank {rank:,} of "
                        f"{dimension:,}): some features never vary or depend on others"
                    )
        if self.network.is_inception and self.reference.statistics and not self.reference.card:
            notes.append(
                f"{self.reference.name} does not say how its statistics were made; here --resize="
                f"{self.network.card['resize']} (ADM's batches are tf1, pytorch-fid's files torch)"
            )
        if (images := self.reference.images) and images.shape[:2] != samples.shape[:2]:
            notes.append(
                f"samples are {samples.shape[0]}x{samples.shape[1]}, the reference "
                f"{images.shape[0]}x{images.shape[1]}: the difference in sharpness counts too"
            )
        return notes


def check_names(metrics: Sequence[str]) -> None:
    """
    Raises:
      InputError: a metric that there is not.
    """
    if unknown := [m for m in metrics if m not in METRICS]:
        raise InputError(f"no metric {unknown[0]!r}: choose from {', '.join(METRICS)}")


def _check_statistics(reference: Reference, network: FeatureNetwork) -> None:
    """Statistics have a size, and if they were made here they say by which network.

    Raises:
      InputError: made by another one, or with the other resize.
    """
    for name, found in reference.statistics.items():
        expected = network.dimensions.get(name, len(found.mean))
        if len(found.mean) != expected:
            raise InputError(
                f"{reference.name} has statistics of {len(found.mean)} numbers an image ({name}), "
                f"this feature network gives {expected}: use the network that made them"
            )
    card = (reference.card or {}).get("features")
    if card is None:
        return
    different = {
        key: (card.get(key), network.card.get(key))
        for key in ("network", "digest", "resize")
        if card.get(key) != network.card.get(key)
    }
    if different:
        text = ", ".join(f"{key} {a}, now {b}" for key, (a, b) in different.items())
        raise InputError(
            f"{reference.name} was made with other features ({text}): use the same --features "
            "and --resize, or make it again with --statistics_out"
        )


def environment() -> dict[str, Any]:
    """Library versions and devices."""
    return {
        "versions": {name: version(name) for name in PACKAGES},
        "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
    }
