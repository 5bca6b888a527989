"""Digits with times moved towards noise, and more of them in the middle (docs/rae.md).

    python -m ppflow_jax.main --config=configs/digits_rae.py --workdir=runs/shifted

The rule for the shift, `config.flow.shift=0`, is for latents of 4096 numbers and more; these have
64.
"""

from configs import digits


def get_config(pyramid: str = ""):
    c = digits.get_config(pyramid)
    c.flow.shift = 2.0
    c.flow.times = "logit_normal:mean=0,std=1"
    return c
