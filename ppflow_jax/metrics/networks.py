"""Networks that turn pictures into features: the Inception of FID, and small ones trained here.

On disk each lies in the folders of a checkpoint (files/store.py): `state` is its parameters, and
`config` says which it is and which parts it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from ppflow_jax.devices.sharding import leaf_path
from ppflow_jax.errors import InputError
from ppflow_jax.files.store import find_checkpoint, load_stored, read_json, write_checkpoint
from ppflow_jax.metrics.inception import Inception, InceptionConfig, Params
from ppflow_jax.metrics.resize import inception_input
from ppflow_jax.metrics.small_network import FeatureNet, FeatureNetConfig


def save_inception(target: str | Path, config: InceptionConfig, params: Params, dtype: str) -> None:
    """A new folder with an Inception network; `dtype` is that of the file it came from.

    Raises:
      InputError: something is there already, or it cannot be written.
    """
    write_checkpoint(target, params, {"inception": {"config": asdict(config), "dtype": dtype}})


def load_inception(path: str | Path) -> tuple[InceptionConfig, Params, str]:
    """Config, float32 parameters and the dtype of the source.

    Raises:
      InputError: not there, not an Inception network, or damaged.
    """
    folder = find_checkpoint(path)
    values = read_json(folder).get("inception")
    if values is None:
        raise InputError(
            f"{path} is no Inception network: make one with python -m ppflow_jax.convert, see "
            "docs/weights.md"
        )
    config = InceptionConfig(**values["config"])
    return config, load_stored(folder, Inception(config).abstract_params()), values["dtype"]


def digest(params: Params) -> str:
    """16 hex digits that change with any bit of any parameter (SHA-256 over paths and bytes)."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        found.update(f"{leaf_path(path)} {array.dtype} {array.shape}\n".encode())
        found.update(array.data)
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class FeatureNetwork:
    """A network as the metrics see it.

    Attributes:
      function: (params, uint8 pictures) -> features by the names in `dimensions`, to be jitted.
      tokens: (params, uint8 pictures) -> features by place [b, rows, columns, d], to be jitted: of
        Inception those of Mixed_6e, of a small network those that `features` is the mean of.
      dimensions: of `features` and, where there are such, `spatial` and `logits`.
      shape: of the only pictures it takes; None: any with 1 or 3 channels.
      card: what is written beside every number.
    """

    function: Callable[
        [Params, UInt8[Array, "b h w c"], tuple[str, ...]], dict[str, Float[Array, "b _"]]
    ]
    tokens: Callable[[Params, UInt8[Array, "b h w c"]], Float[Array, "b rows columns d"]]
    params: Params
    dimensions: dict[str, int]
    shape: tuple[int, int, int] | None
    card: dict[str, Any]

    @property
    def is_inception(self) -> bool:
        return self.card["network"] == "inception"


def inception_features(
    config: InceptionConfig, params: Params, resize: str, pooled: str = "2048"
) -> FeatureNetwork:
    """The Inception network with one of the `resize.CONVENTIONS`; `pooled` names the features."""
    network = Inception(config)
    ours = {"features": pooled, "spatial": "spatial", "logits": "logits_unbiased"}

    def function(params, images, names):
        x = inception_input(images, resize)
        found = network.features(params, x, tuple(ours[name] for name in names))
        return {name: found[ours[name]] for name in names}

    def tokens(params, images):
        return network.maps(params, inception_input(images, resize))["Mixed_6e"]

    dimensions = {"features": int(pooled), "spatial": 2023}
    card = {"network": "inception", "digest": digest(params), "resize": resize}
    if config.logits:
        dimensions["logits"] = 1008
    return FeatureNetwork(function, tokens, params, dimensions, None, card)


def small_features(
    config: FeatureNetConfig, params: Params, origin: dict[str, Any]
) -> FeatureNetwork:
    """A network trained here; `origin` says on what (see train_small_network.py)."""
    network = FeatureNet(config)
    card = {"network": "small", "digest": digest(params), **origin}
    return FeatureNetwork(
        lambda params, images, names: network.features(params, images, names),
        network.tokens,
        params,
        {"features": config.widths[-1], "logits": config.classes},
        (config.size, config.size, config.channels),
        card,
    )


def save_small(
    target: str | Path, config: FeatureNetConfig, params: Params, origin: dict[str, Any]
) -> None:
    """A new folder with a network trained here.

    Raises:
      InputError: something is there already, or it cannot be written.
    """
    values = {"feature_net": {"config": asdict(config), "origin": origin}}
    write_checkpoint(target, params, values)


def load_features(path: str | Path, resize: str) -> FeatureNetwork:
    """Whichever of the two lies at `path`; `resize` is for Inception.

    Raises:
      InputError: not there, neither of them, or damaged.
    """
    folder = find_checkpoint(path)
    values = read_json(folder)
    if "inception" in values:
        config, params, _ = load_inception(path)
        return inception_features(config, params, resize)
    if "feature_net" not in values:
        raise InputError(
            f"{path} is no feature network: give an Inception made by python -m "
            "ppflow_jax.convert (docs/weights.md), or one made by evaluate --train_features"
        )
    settings = values["feature_net"]["config"]
    config = FeatureNetConfig(**(settings | {"widths": tuple(settings["widths"])}))
    params = load_stored(folder, FeatureNet(config).abstract_params())
    return small_features(config, params, values["feature_net"]["origin"])
