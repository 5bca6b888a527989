"""Models from disk, and the judgement of their samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ppflow_jax.api.inputs import DTYPES, Samples, seed_of
from ppflow_jax.api.model import Model
from ppflow_jax.checkpoints.weights import Weights, open_weights
from ppflow_jax.convert.infer import find_kind
from ppflow_jax.convert.names import Wanted
from ppflow_jax.convert.reading import Reading, read_model
from ppflow_jax.convert.shards import find_weights, on_disk
from ppflow_jax.convert.source import open_source
from ppflow_jax.data.images import ImageSet, array_images, open_images
from ppflow_jax.errors import InputError, check_address
from ppflow_jax.files.hub import fetched, is_hub
from ppflow_jax.files.place import place
from ppflow_jax.metrics.evaluator import Evaluator, open_reference
from ppflow_jax.metrics.networks import load_features

AS_THE_FILE_SAYS = Reading()


def load(
    path: str | Path,
    *,
    weights: str = "ema",
    dtype: str = "float32",
    reading: Reading = AS_THE_FILE_SAYS,
) -> Model:
    """A model of a run's folder, one of its steps, a converted folder, or a PyTorch file.

    Args:
      path: folder, or a .pt, .pth, .bin or .safetensors file (or its index); also in an object
        store, or hf:OWNER/REPO[/FILE][@REVISION].
      weights: `ema`, or `params` as last trained.
      dtype: of matrix products, float32 or bfloat16.
      reading: what a file does not say; sizes and pyramid come from the file.

    Raises:
      InputError: not there, damaged, or no SiT or PPFlow model.
    """
    check_address(str(path), "path", stores=True, hub=True)
    if weights not in ("ema", "params") or dtype not in DTYPES:
        raise InputError(
            f"weights={weights!r}, dtype={dtype!r}: weights are ema or params, dtype is "
            f"{' or '.join(DTYPES)}"
        )
    file = fetched(path) if is_hub(path) else place(path)
    if file.is_dir() and (found := find_weights(str(file))):
        file = found
    if file.is_file():
        file = on_disk(file)
    if file.is_dir() or not file.exists():
        model = Model(open_weights(file, weights), dtype)
        jax.block_until_ready(model.params)  # what is damaged is said here
        return model
    source = open_source(
        str(file), Wanted("sit", "model" if weights == "params" else None, None, None)
    )
    kind = find_kind(source.state)
    loaded = read_model(source, kind, replace(reading, dtype="float32"))
    params = jax.device_put(loaded.params)
    return Model(Weights(loaded.card, file, weights, lambda: params), dtype)


def evaluate(
    samples: Samples | np.ndarray | str,
    reference: str,
    features: str,
    *,
    metrics: Sequence[str] = (),
    resize: str = "tf1",
    seed: int = 0,
) -> dict[str, Any]:
    """FID and its relatives, with everything that made them, as the command `evaluate` writes it.

    Args:
      samples: of `Model.sample`, uint8 pictures [n, h, w, c], or what `--samples` takes.
      reference: what `--reference` takes.
      features: folder of a feature network.
      metrics: some of `metrics.evaluator.METRICS`; default: all that can be had.

    Raises:
      InputError: sets or networks that do not fit together.
    """
    evaluator = Evaluator(
        load_features(features, resize),
        open_reference(reference),
        tuple(metrics),
        seed=seed_of(seed),
    )
    return evaluator(_images(samples))


def _images(samples: Samples | np.ndarray | str) -> ImageSet:
    if isinstance(samples, str):
        return open_images(samples)
    pictures = samples.pictures if isinstance(samples, Samples) else np.asarray(samples)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] not in (1, 3):
        raise InputError(
            f"samples are {pictures.dtype} {pictures.shape}, expected uint8 (n, h, w, 1 or 3)"
        )
    return array_images("samples", pictures)
