"""Digits from digits: a model that is told a part of the picture it is to make.

    python -m ppflow_jax.main --config=configs/digits_tasks.py:inpainting --workdir=runs/inpainting

`:super_resolution` (4x4 to 8x8 pixels), `:inpainting` (a hidden box), `:edges`. `:cascade` is the
second model of a cascade (docs/cascade.md). `:colourisation` is refused: digits are grey. See
docs/conditions.md.
"""

from configs import digits

TASKS = {
    "super_resolution": "super_resolution:factor=2",
    "inpainting": "inpainting",
    "edges": "edges",
    "colourisation": "colourisation",
    "cascade": "cascade:factor=2,noise=0.1",
}


def get_config(variant: str = "super_resolution"):
    if variant not in TASKS:
        raise ValueError(f"unknown variant {variant!r}: one of {', '.join(TASKS)}")
    c = digits.get_config()
    c.data.task = TASKS[variant]
    # What the model is told says more than guidance towards a class
    c.sample.cfg = (1.0,)
    return c
