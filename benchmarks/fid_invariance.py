"""FID of 10,000 pictures: against itself, under noise, and by batch size, devices and order.

    python -m benchmarks.fid_invariance --features=DIR

The pictures are the 1,797 digits of scikit-learn, each several times under weak noise of its own;
`--features` is a network trained on digits (evaluate --train_features). Eight fake CPU devices.
Exit code 1 where FID of the set itself reaches 1e-3, does not grow with noise, or moves by more
than 1e-6 of itself.
"""

from __future__ import annotations

import argparse

import jax
import numpy as np

COUNT = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--features", required=True)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    from ppflow_jax.data.images import array_images
    from ppflow_jax.data.sources import digits
    from ppflow_jax.data.transforms import to_uint8
    from ppflow_jax.metrics.extract import extract
    from ppflow_jax.metrics.frechet import frechet_distance
    from ppflow_jax.metrics.networks import load_features

    network = load_features(args.features, "tf1")
    base = to_uint8(digits().x)
    base = np.resize(base, (COUNT, *base.shape[1:]))

    def noisy(level: float, seed: int) -> np.ndarray:
        noise = np.random.default_rng(seed).normal(size=base.shape) * level
        return np.clip(base + noise, 0, 255).astype(np.uint8)

    def statistics(pictures: np.ndarray, **options):
        options = {"batch": 1000} | options
        return extract(array_images("pictures", pictures), network, **options).statistics[
            "features"
        ]

    real = noisy(8, 0)
    known = statistics(real)
    wrong = 0
    own = frechet_distance(known, known).distance
    wrong += not abs(own) < 1e-3
    print(f"{COUNT:,} pictures against themselves: {own:.2e}")
    last = own
    for level in (2, 5, 10, 20, 40, 80):
        added = np.random.default_rng(1).normal(size=base.shape) * level
        value = frechet_distance(
            known, statistics(np.clip(real + added, 0, 255).astype(np.uint8))
        ).distance
        wrong += not value > last
        last = value
        print(f"noise of {level} levels added: {value:.6f}")
    samples = noisy(30, 2)
    first = frechet_distance(known, statistics(samples)).distance
    order = np.random.default_rng(3).permutation(COUNT)
    devices = jax.devices()
    for what, pictures, options in (
        ("batch of 64", samples, {"batch": 64}),
        ("batch of 777", samples, {"batch": 777}),
        ("1 device", samples, {"devices": devices[:1]}),
        ("3 devices, batch of 100", samples, {"devices": devices[:3], "batch": 100}),
        ("another order", samples[order], {}),
    ):
        value = frechet_distance(known, statistics(pictures, **options)).distance
        change = abs(value / first - 1)
        wrong += not change <= 1e-6
        print(f"{what}: {value:.9f}, {change:.1e} from 8 devices and batches of 1,000")
    raise SystemExit(int(wrong > 0))


if __name__ == "__main__":
    main()
