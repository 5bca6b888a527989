"""A small model on latents 16x16x4 of imagenette (10 classes, 128x128 pixels) for studies.

    python -m ppflow_jax.main --config=configs/imagenette.py --workdir=DIR \\
        --config.data.path=LATENTS

LATENTS holds latents.npy and labels.npy (docs/data.md). Parameters: 1.3 M. `:sit` is the one-stage
baseline, `:levels3` has three stages.
"""

from configs import common
from configs.digits import PYRAMIDS


def get_config(variant: str = ""):
    if variant not in PYRAMIDS:
        raise ValueError(f"unknown variant {variant!r}: sit, levels3 or none")
    c = common.get_config("S", PYRAMIDS[variant])
    c.model.update(dict(latent_size=16, channels=4, num_classes=10, width=128, depth=4, heads=4))
    c.model.learn_sigma = False
    c.model.dtype = "float32"
    c.data.batch_size = 64
    c.optim.lr = 1e-3
    c.optim.warmup_steps = 25
    c.optim.schedule = "cosine"
    c.train.steps = 400
    c.train.ema = 0.99
    c.train.log_every = 10
    c.train.save_every = 100
    c.sample.every = 250
    c.sample.count = 40
    c.sample.solver = "euler"
    c.sample.steps = 24
    c.sample.cfg = (2.0,)
    return c
