"""Digits with the features of a small classifier as REPA's teacher (docs/repa.md).

    python -m ppflow_jax.main --config=configs/digits_repa.py --config.data.path=DIR --workdir=DIR

The teacher's term ends half way, as in HASTE.
"""

from configs import digits


def get_config():
    c = digits.get_config()
    c.data.source = "arrays"  # of prepare --source=digits --fields=teacher=NETWORK
    c.data.fields = ("teacher",)
    c.flow.terms = ("repa:layer=3,dims=64,hidden=128",)
    c.train.phases = ((300, {"repa": 0.5}), (600, {}))
    return c
