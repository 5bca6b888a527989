"""Digits with MLPs in slices, cut from a plain run and taught by it (docs/dense2moe.md).

    python -m ppflow_jax.convert.rank --source=runs/digits --target=runs/ranked
    python -m ppflow_jax.main --config=configs/digits_dense2moe.py --workdir=runs/slices \
        --config.train.teacher=runs/ranked

First the shared slices learn alone, then the experts with them. `:sit` and `:levels3` are of one
and three stages.
"""

from configs import digits

SHARED_SHARE = 1 / 3  # of the steps, for the shared slices alone


def get_config(variant: str = ""):
    c = digits.get_config(variant)
    c.model.ffn = "dense2moe:experts=12,top_k=2,shared=1.0"
    c.flow.objective = "dense2moe:features=1.0,every=1"
    c.train.steps = 600
    first = round(SHARED_SHARE * c.train.steps)
    c.train.phases = (
        (first, {"shared": 1.0, "experts": 0.0}),
        (c.train.steps, {"shared": 0.0, "experts": 1.0}),
    )
    return c
