"""Digits with what changes blocks or loss alone, trained from nothing (docs/dimr.md).

    python -m ppflow_jax.main --config=configs/digits_blocks.py:tdln --workdir=runs/tdln

`:multires` is the loss at two resolutions, `:dimr` both, `:selfcond` self-conditioning
(docs/self_conditioning.md). `:tdln,sit` and so on are of one stage, `,levels3` of three.
"""

from configs import digits

VARIANTS = ("tdln", "multires", "dimr", "selfcond")


def get_config(variant: str = "tdln"):
    name, _, pyramid = variant.partition(",")
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {name!r}: {', '.join(VARIANTS)}")
    c = digits.get_config(pyramid)
    if name in ("tdln", "dimr"):
        c.model.norm = "tdln"
    if name in ("multires", "dimr"):
        c.flow.terms = ("multires:factors=2",)
        c.train.phases = ((c.train.steps, {"multires": 1.0}),)
    if name == "selfcond":
        c.model.conditions = ("selfcond:name=middle",)
    return c
