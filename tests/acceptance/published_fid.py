"""FID and KID of the real Inception against the values in torchmetrics' documentation.

    python -m tests.acceptance.published_fid --inception=DIR [--batch=25]

torchmetrics 1.9 documents, for two sets of 100 random pictures of 299x299 (integers from [0, 200)
and from [100, 255)), FID with 64 features 12.6388 and KID 0.0312 with a standard deviation of
0.0025 (100 subsets of 50). Its documentation is tested after `torch.manual_seed(42)`; random
weights of the network are drawn before the pictures. PyTorch's pictures and subsets come here from
NumPy's Mersenne Twister, which gives the same numbers. Exit code 1 where a printed digit differs.
"""

from __future__ import annotations

import argparse

import numpy as np

from ppflow_jax.data.images import array_images
from ppflow_jax.metrics.extract import extract
from ppflow_jax.metrics.frechet import frechet_distance
from ppflow_jax.metrics.kid import draw_subsets, kid_of_subsets
from ppflow_jax.metrics.networks import inception_features, load_inception

COUNT, SIZE = 100, 299
SEED = 42
DRAWN_BEFORE = 23_816_528  # convolutions and last layer, one number each
PUBLISHED = {"FID, 64 features": 12.6388, "KID": 0.0312, "KID, standard deviation": 0.0025}


def random_images(random: np.random.RandomState, low: int, high: int) -> np.ndarray:
    """`torch.randint(low, high, (100, 3, 299, 299), dtype=torch.uint8)`, as NHWC."""
    bits = random.randint(0, 2**32, size=COUNT * 3 * SIZE * SIZE, dtype=np.uint32)
    pixels = (bits % (high - low) + low).astype(np.uint8)
    return np.ascontiguousarray(pixels.reshape(COUNT, 3, SIZE, SIZE).transpose(0, 2, 3, 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--inception", required=True, help="converted weights, docs/weights.md")
    parser.add_argument("--batch", type=int, default=25)
    args = parser.parse_args()
    config, params, _ = load_inception(args.inception)
    random = np.random.RandomState(SEED)
    random.randint(0, 2**32, size=DRAWN_BEFORE, dtype=np.uint32)
    sets = [
        array_images(name, random_images(random, *bounds))
        for name, bounds in (("first set", (0, 200)), ("second set", (100, 255)))
    ]

    small = inception_features(config, params, "tf1", "64")
    statistics = [extract(s, small, batch=args.batch).statistics["features"] for s in sets]
    found = {"FID, 64 features": frechet_distance(*statistics).distance}
    full = inception_features(config, params, "tf1")
    x, y = (
        extract(s, full, moments=(), keep=("features",), batch=args.batch).kept["features"]
        for s in sets
    )
    rows = draw_subsets(random, COUNT, COUNT, subsets=100, size=50)
    found["KID"], found["KID, standard deviation"] = kid_of_subsets(x, y, *rows)
    wrong = 0
    for name, published in PUBLISHED.items():
        same = f"{found[name]:.4f}" == f"{published:.4f}"
        wrong += not same
        print(f"{name}: {found[name]:.6f}, published {published:.4f}{'' if same else '  DIFFERS'}")
    raise SystemExit(int(wrong > 0))


if __name__ == "__main__":
    main()
