"""Features of sets of pictures, computed over all local devices, and statistics files."""

from __future__ import annotations

import functools
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from ppflow_jax.console import progress
from ppflow_jax.data.images import ImageSet, as_channels
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic
from ppflow_jax.metrics.feature_cache import Autosave, FeatureCache, Partial
from ppflow_jax.metrics.moments import Moments, Statistics
from ppflow_jax.metrics.networks import FeatureNetwork

# Names in statistics files: pytorch-fid has the first pair, ADM's reference batches both.
_KEYS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_CARD = "card"


@dataclass(frozen=True)
class Extracted:
    """What the metrics need of one set: statistics and, where asked for, single features."""

    statistics: dict[str, Statistics] = field(default_factory=dict)
    kept: dict[str, Float[np.ndarray, "n _"]] = field(default_factory=dict)


def extract(
    images: ImageSet,
    network: FeatureNetwork,
    *,
    moments: tuple[str, ...] = ("features",),
    keep: tuple[str, ...] = (),
    batch: int = 64,
    devices: list[jax.Device] | None = None,
    cache: FeatureCache | None = None,
) -> Extracted:
    """One pass over the pictures: statistics of `moments`, float32 arrays of `keep`.

    A batch (at least one picture a device) is shared among the devices of this process; sums are
    float64 on the host, so neither its size nor the number of devices nor the order matters.
    What is in the `cache` is not computed again.

    Raises:
      InputError: pictures that the network does not take or that cannot be read.
    """
    check_shape(images.name, images.shape, network)
    found = cache.load() if cache else None
    if found is None:
        found = Partial(0, {name: Moments() for name in moments}, {name: [] for name in keep})
    if found.done < images.count:
        devices = devices or jax.local_devices()
        found = _continue(found, images, network, batch, devices, cache)
    return Extracted(
        {name: sums.statistics() for name, sums in found.sums.items()},
        {name: np.concatenate(parts) for name, parts in found.parts.items()},
    )


def _continue(
    found: Partial,
    images: ImageSet,
    network: FeatureNetwork,
    batch: int,
    devices: list[jax.Device],
    cache: FeatureCache | None,
) -> Partial:
    """With the pictures that are missing."""
    mesh = Mesh(np.array(devices), ("data",))
    place, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    names = tuple(dict.fromkeys([*found.sums, *found.parts]))
    function = jax.jit(functools.partial(network.function, names=names))
    params = jax.device_put(network.params, everywhere)
    batch = -(-min(batch, images.count) // len(devices)) * len(devices)
    bar = progress(images.count, found.done, "img", f"features of {Path(images.name).name}")
    autosave = Autosave(cache)

    def collect(features, count):
        nonlocal found
        for name, values in features.items():
            host = np.asarray(values)[:count]
            if name in found.sums:
                found.sums[name].add(host)
            if name in found.parts:
                found.parts[name].append(host)
        found = found._replace(done=found.done + count)
        bar.update(count)
        autosave.note(found, found.done == images.count)

    running = None
    channels = network.shape[-1] if network.shape else 3
    with bar:
        for some in images.batches(batch, found.done):
            some = as_channels(some, channels)
            padded = np.pad(some, [(0, batch - len(some)), (0, 0), (0, 0), (0, 0)])
            ahead = function(params, jax.device_put(padded, place)), len(some)
            if running:
                collect(*running)  # while the devices work
            running = ahead
        collect(*running)
    return found


def check_shape(name: str, shape: tuple[int, ...], network: FeatureNetwork) -> None:
    """Small networks take the size that they were trained on, Inception any.

    Raises:
      InputError: another size.
    """
    if network.shape and shape[:2] != network.shape[:2]:
        raise InputError(
            f"{name} is {shape[0]}x{shape[1]}: the feature network takes {network.shape[0]}x"
            f"{network.shape[1]}, the size of what it was trained on"
        )


def save_statistics(path: Path, statistics: dict[str, Statistics], card: dict[str, Any]) -> None:
    """`mu`, `sigma` (and `mu_s`, `sigma_s`) as others read them, and a JSON `card` beside."""
    arrays = {}
    for name, found in statistics.items():
        arrays |= dict(zip(_KEYS[name], (found.mean, found.covariance)))
    count = next(iter(statistics.values())).count
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays, **{_CARD: np.array(json.dumps(card | {"count": count}))})


def _what_is(path: Path) -> str:
    """What a file is that should be an npz, and what to do."""
    with path.open("rb") as file:
        head = file.read(8)
    if head[:1] == b"\x80":
        return (
            "it is a pickle, which may run code when it is read: where you trust it, load it with "
            "the code that made it and save mu and sigma with numpy.savez"
        )
    if head[:6] == b"\x93NUMPY":
        return "it is a single .npy array: save images as numpy.savez(FILE, arr_0=images)"
    if not head:
        return "it is empty: make or copy it again"
    return "give an npz with arr_0 or with mu and sigma, a folder of images, or digits"


def read_statistics(path: Path) -> tuple[dict[str, Statistics], dict[str, Any] | None]:
    """Statistics by name, none if the npz has no `mu`, and the card if it was made here.

    Raises:
      InputError: not readable, or arrays of other dtypes or shapes.
    """
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is no npz: {_what_is(path)}")
    try:
        with np.load(path, allow_pickle=False) as file:
            wanted = {key for pair in _KEYS.values() for key in pair}
            arrays = {key: file[key] for key in file.files if key in wanted}
            card = json.loads(str(file[_CARD])) if _CARD in file.files else None
    # NumPy reports what is no npz with many exceptions, among them EOFError and BadZipFile
    except Exception as error:
        raise InputError(
            f"cannot read {path} ({error}): expected an npz of plain arrays, as numpy.savez makes "
            "them"
        ) from error
    found = {}
    for name, (mu, sigma) in _KEYS.items():
        if not {mu, sigma} & arrays.keys():
            continue
        if not {mu, sigma} <= arrays.keys():
            raise InputError(f"{path} has only one of {mu} and {sigma}: both are needed")
        mean, covariance = arrays[mu], arrays[sigma]
        if not all(np.issubdtype(a.dtype, np.floating) for a in (mean, covariance)):
            raise InputError(
                f"{path}: {mu} is {mean.dtype} and {sigma} is {covariance.dtype}, expected float64"
            )
        for key, array in ((mu, mean), (sigma, covariance)):
            if not np.isfinite(array).all():
                raise InputError(
                    f"{path}: {key} has values that are NaN or infinite: make the statistics again"
                )
        if mean.ndim != 1 or covariance.shape != mean.shape * 2:
            raise InputError(
                f"{path}: {mu} has shape {mean.shape} and {sigma} {covariance.shape}, expected "
                "(d,) and (d, d)"
            )
        if not np.allclose(covariance, covariance.T) or covariance.diagonal().min() < 0:
            raise InputError(
                f"{path}: {sigma} is no covariance (symmetric, no negative variances): make the "
                "statistics again"
            )
        count = card["count"] if card else 0
        found[name] = Statistics(np.float64(mean), np.float64(covariance), count)
    return found, card
