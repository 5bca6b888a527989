"""The random weights of the reference Inception, made by rule (tests/reference/README.md)."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np

REFERENCE = Path(__file__).parent / "reference" / "inception"


def entries() -> dict[str, dict]:
    """Shape and a few numbers to check of every tensor, by pytorch-fid's names."""
    return json.loads((REFERENCE / "entries.json").read_text())


def random_state() -> dict[str, np.ndarray]:
    """The state dict, checked against the numbers of the reference."""
    state = {}
    for name, entry in entries().items():
        shape = tuple(entry["shape"])
        n = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if len(shape) == 4:
            n = (n - n.mean(axis=(1, 2, 3), keepdims=True)) * math.sqrt(3 / math.prod(shape[1:]))
        elif name == "fc.weight":
            n = (n - n.mean(axis=1, keepdims=True)) * math.sqrt(36 / shape[1])
        elif name.endswith("bn.weight"):
            n = 1 + 0.1 * n
        elif name.endswith("running_var"):
            n = 1 + 0.2 * np.abs(n)
        else:
            n = 0.1 * n
        state[name] = n.astype(np.float32)
        found = state[name].flat[0], state[name].flat[-1], state[name].sum(dtype=np.float64)
        expected = entry["first"], entry["last"], entry["sum"]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6, err_msg=name)
    return state
