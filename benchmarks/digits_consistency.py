"""Share of sampled digits that a classifier of real digits recognises as their label.

    python -m benchmarks.digits_consistency DIR    # of `sample --save_latents --out=DIR`

The judge is an RBF support vector machine trained on all 1,797 real digits of scikit-learn; its
own accuracy on held-out real digits (5-fold) is printed beside, as the ceiling of the figure.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC


def consistency(images: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray, float]:
    """Share recognised, share by class, and the judge's cross-validated accuracy on real digits.

    `images` are [-1, 1] of shape (n, 8, 8, 1).
    """
    data = load_digits()
    judge = SVC(gamma=0.001, C=10)  # pixels 0..16, the classical setting for this dataset
    real = cross_val_score(judge, data.data, data.target, cv=5).mean()
    pixels = np.clip((images.reshape(len(images), -1) + 1) * 8, 0, 16)
    right = judge.fit(data.data, data.target).predict(pixels) == labels
    return (
        float(right.mean()),
        np.array([right[labels == c].mean() for c in range(10)]),
        float(real),
    )


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print("usage: python -m benchmarks.digits_consistency DIR", file=sys.stderr)
        return 2
    folder = Path(argv[1])
    images, labels = np.load(folder / "latents.npy"), np.load(folder / "labels.npy")
    share, by_class, real = consistency(images, labels)
    judged = f"(judge on real digits: {real:.1%})"
    print(f"class consistency of {len(images)} samples: {share:.1%} {judged}")
    print("by class: " + " ".join(f"{c}:{s:.0%}" for c, s in enumerate(by_class)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
