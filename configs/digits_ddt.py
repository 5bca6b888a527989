"""Digits with a wide head (DiT^DH of RAE), of like FLOPs as the plain model (docs/rae.md).

    python -m ppflow_jax.main --config=configs/digits_ddt.py --workdir=runs/wide

`configs/digits_ddt.py:sit` has one stage, `:levels3` three.
"""

from configs import digits

MODEL = {
    "width": 80,
    "depth": 5,
    "heads": 4,
    "network": "ddt:width=144,depth=2,heads=4",
    "mixer": "rope",
    "ffn": "swiglu",
}


def get_config(pyramid: str = ""):
    c = digits.get_config(pyramid)
    c.model.update(MODEL)
    return c
