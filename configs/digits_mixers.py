"""Digits with local or linear attention, taught by a plain run, or convolutions (docs/mixers.md).

    python -m ppflow_jax.main --config=configs/digits_mixers.py:clear --workdir=runs/clear \
        --config.train.teacher=runs/digits

`:linfusion` is the other; `:dico` is trained from nothing. `:clear,sit` and so on are of one stage,
`,levels3` of three.
"""

from configs import digits

MIXERS = {"clear": "clear:radius=2", "linfusion": "linfusion", "dico": "dico"}


def get_config(variant: str = "clear"):
    name, _, pyramid = variant.partition(",")
    if name not in MIXERS:
        raise ValueError(f"unknown variant {name!r}: clear, linfusion or dico")
    c = digits.get_config(pyramid)
    c.model.mixer = MIXERS[name]
    if name == "dico":
        return c
    c.flow.objective = "distil:kd=0.5,features=0.5,every=2"
    return c
