"""Digits with the network of DiCo, at the FLOPs of the one-stage transformer of digits.py.

    python -m ppflow_jax.main --config=configs/digits_dico.py --workdir=runs/dico

`:levels2` has two stages, 2x2 patches until t = 0.5 (docs/dico.md).
"""

from configs import digits

PYRAMIDS = {"": "1x1@1", "levels2": "2x2@0.5,1x1@1"}
MODEL = dict(width=48, depth=9, heads=1, mlp_ratio=2.0, network="dico:depths=2/2/2/2/1")


def get_config(variant: str = ""):
    if variant not in PYRAMIDS:
        raise ValueError(f"unknown variant {variant!r}: levels2 or none")
    c = digits.get_config()
    c.model.pyramid = PYRAMIDS[variant]
    c.model.update(MODEL)
    return c
