"""Pictures to metrics with the reference Inception's random weights, both resizes.

    python -m tests.acceptance.inception_parity DIR

DIR has images.npz, features.npz and image_set_metrics.json. Eight pictures of four sizes: pooled,
spatial and class features against pytorch-fid's in float64 (bounds on the relative rms and maximum:
2e-4, 4e-3, those of PyTorch's own float32), and FID, sFID, KID and Inception Score of the stored
features (1e-6 relative, KID 1e-6 absolute) and of ours (2e-5, KID 1e-6 absolute). Exit code 1 where
one is over.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from ppflow_jax.convert.inception_keys import inception_params
from ppflow_jax.data.images import array_images
from ppflow_jax.metrics.extract import extract
from ppflow_jax.metrics.frechet import frechet_distance
from ppflow_jax.metrics.inception_score import inception_scores
from ppflow_jax.metrics.kid import kid
from ppflow_jax.metrics.moments import Moments
from ppflow_jax.metrics.networks import inception_features
from tests.inception import random_state

NAMES = {"features": "pool3", "spatial": "spatial", "logits": "logits_nobias"}


def metrics(found: dict[str, np.ndarray]) -> dict[str, float]:
    """Of images 0-3 (reference) against 4-7."""
    values = {}
    for metric, name in (("fid", "features"), ("sfid", "spatial")):
        pair = []
        for part in (found[name][:4], found[name][4:]):
            moments = Moments()
            moments.add(part)
            pair.append(moments.statistics())
        values[metric] = frechet_distance(*pair).distance
    values["kid"] = kid(found["features"][:4], found["features"][4:])
    values["inception_score"] = float(inception_scores(found["logits"]).mean())
    return values


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print("usage: python -m tests.acceptance.inception_parity DIR", file=sys.stderr)
        return 2
    folder, wrong = Path(argv[1]), 0
    published = json.loads((folder / "image_set_metrics.json").read_text())
    config, params = inception_params(random_state())
    with np.load(folder / "images.npz") as file:
        sets = [file[f"images_{size}"] for size in ("64", "299", "256", "640x64")]
    for resize, name in (("tf1", "tf1"), ("torch", "pytorch")):
        network = inception_features(config, params, resize)
        parts = [
            extract(array_images("pictures", s), network, moments=(), keep=tuple(NAMES)).kept
            for s in sets
        ]
        ours = {key: np.concatenate([part[key] for part in parts]) for key in NAMES}
        with np.load(folder / "features.npz") as file:
            theirs = {key: file[f"{name}/{reference}"] for key, reference in NAMES.items()}
        for key in NAMES:
            difference, size = np.abs(ours[key] - theirs[key]), np.sqrt(np.mean(theirs[key] ** 2))
            rms, largest = np.sqrt(np.mean(difference**2)) / size, difference.max() / size
            wrong += rms > 2e-4 or largest > 4e-3
            print(f"{resize} {key}: rms {rms:.1e}, maximum {largest:.1e}")
        for what, found, bound in (("stored", theirs, 1e-6), ("our", ours, 2e-5)):
            for metric, value in metrics(found).items():
                expected = published[name][metric]
                difference = abs(value - expected)
                wrong += difference > (1e-6 if metric == "kid" else bound * abs(expected))
                print(f"{resize} {metric} of {what} features: {value:.9f} ({difference:.1e} away)")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
