"""Digits in few evaluations: average velocities, or a student of a guided model.

    python -m ppflow_jax.main --config=configs/digits_few_steps.py:meanflow --workdir=runs/meanflow
    python -m ppflow_jax.main --config=configs/digits_few_steps.py:guided --workdir=runs/guided \
        --config.train.teacher=runs/digits
    python -m ppflow_jax.main --config=configs/digits_few_steps.py:halved --workdir=runs/halved \
        --config.train.teacher=runs/guided

`:meanflow,sit` and so on are of one stage, `,levels3` of three.
"""

from configs import digits

INTERVAL, GUIDANCE = "scalar:name=interval,scale=1", "scalar:name=guidance"


def get_config(variant: str = "meanflow"):
    name, _, pyramid = variant.partition(",")
    c = digits.get_config(pyramid)
    if name == "meanflow":
        c.model.conditions = (INTERVAL,)
        c.flow.objective = "meanflow:points=0.5,omega=1,kappa=0.5"  # guided with a scale of 2
        c.sample.update(dict(solver="meanflow", steps=2, cfg=(1.0,)))
    elif name == "guided":
        c.model.conditions = (GUIDANCE,)
        c.flow.objective = "guided:low=1,high=4"
        c.flow.label_drop = 0.0
    elif name == "halved":
        c.model.conditions = (GUIDANCE,)
        c.flow.objective = "halved:steps=8,low=1,high=4"
        c.flow.label_drop = 0.0
        c.sample.update(dict(solver="euler", steps=8))
    else:
        raise ValueError(f"unknown variant {name!r}: meanflow, guided or halved")
    return c
