"""Digits with MLPs in slices, cut from a plain run and taught by it (docs/dense2moe.md).

    python -m ppflow_jax.convert.rank --source=runs/digits --target=runs/ranked
    python -m ppflow_jax.main --config=configs/digits_dense2moe.py --workdir=runs/slices \
        --config.train.teacher=runs/ranked

First the shared slices learn alone, then the experts with them. `:sit` and `:levels3` are of one
and three stages. `:mob` leaves out a block of every three, and starts from the run above:

    python -m ppflow_jax.main --config=configs/digits_dense2moe.py:mob --workdir=runs/fewer \
        --config.init_from=runs/slices --config.train.teacher=runs/ranked
"""

from configs import digits

SHARED_SHARE = 1 / 3  # of the steps, for the shared slices alone
PYRAMIDS = ("", "sit", "levels3")


def get_config(variant: str = ""):
    pyramid, _, mob = variant.rpartition(",") if variant.endswith("mob") else (variant, "", "")
    if pyramid not in PYRAMIDS or mob not in ("", "mob"):
        raise ValueError(f"unknown variant {variant!r}: sit, levels3, mob, sit,mob or levels3,mob")
    c = digits.get_config(pyramid)
    c.model.ffn = "dense2moe:experts=12,top_k=2,shared=1.0"
    c.flow.objective = "dense2moe:features=1.0,every=1"
    if mob:
        c.model.wrap = "mob:group=3,kept=2"
        c.flow.objective = "dense2moe:features=1.0,every=3"
        return c
    c.train.phases = (
        (round(SHARED_SHARE * c.train.steps), {"shared": 1.0, "experts": 0.0}),
        (c.train.steps, {"shared": 0.0, "experts": 1.0}),
    )
    return c
