"""Digits with students in the place of blocks, distilled from the run that they stand in (PPCL).

    python -m ppflow_jax.evaluate.prune --checkpoint=runs/digits --remove=2,2 --target=students
    python -m ppflow_jax.main --config=configs/digits_ppcl.py --workdir=runs/ppcl \\
        --config.init_from=students

The students are those of the checkpoint; those below, where it has none, as with
`--config.init_from=runs/digits`. `:sit` is of one stage, `:levels3` of three.
"""

from configs import digits
from ppflow_jax.systems.ppcl import TRAINABLE


def get_config(variant: str = ""):
    c = digits.get_config(variant)
    c.model.students = "0:0-1,0:3-4"  # four blocks of the coarse stage in place of six
    c.flow.objective = "ppcl:magnitude=0.1"
    c.train.trainable = TRAINABLE
    c.train.steps = 300
    c.optim.warmup_steps = 16
    return c
