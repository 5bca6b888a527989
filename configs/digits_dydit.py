"""Digits with routers that learn what need not be computed (docs/dydit.md), from a trained run.

    python -m ppflow_jax.main --config=configs/digits_dydit.py --workdir=runs/dydit \
        --config.init_from=runs/digits

`:sit` and `:levels3` are of one stage and of three, as their runs must be.
"""

from configs import digits


def get_config(variant: str = ""):
    c = digits.get_config(variant)
    c.model.wrap = "dydit"
    c.flow.objective = "dydit:share=0.6,warmup=300"
    c.optim.clip = 50.0  # the release's for a share of 0.7
    c.train.steps = 600
    return c
