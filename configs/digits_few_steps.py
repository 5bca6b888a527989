"""Digits in few evaluations: average velocities, a student, or few steps that were fine-tuned.

    python -m ppflow_jax.main --config=configs/digits_few_steps.py:meanflow --workdir=runs/meanflow
    python -m ppflow_jax.main --config=configs/digits_few_steps.py:guided --workdir=runs/guided \
        --config.train.teacher=runs/digits
    python -m ppflow_jax.main --config=configs/digits_few_steps.py:halved --workdir=runs/halved \
        --config.train.teacher=runs/guided
    python -m ppflow_jax.main --config=configs/digits_few_steps.py:mmd --workdir=runs/mmd \
        --config.train.teacher=runs/digits

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
    elif name == "mmd":
        c.flow.objective = "mmd:steps=4,scale=2"
        c.optim.update(dict(lr=5e-5, warmup_steps=0, clip=0.5))
        c.train.steps = 100
        c.sample.update(dict(solver="euler", steps=4))
    else:
        raise ValueError(f"unknown variant {name!r}: meanflow, guided, halved or mmd")
    return c
