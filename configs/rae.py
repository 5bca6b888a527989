"""DiT^DH on the latents of a representation autoencoder (RAE, arXiv 2510.11690): its recipe.

    python -m ppflow_jax.main --config=configs/rae.py --workdir=runs/rae --config.data.path=LATENTS

Latents of 768x16x16 (DINOv2-B of 256-pixel pictures), normalised as the original does. The variants
`:s`, `:b`, `:l` and `:xl` (the default) have the paper's sizes; `:s`, trained for 14 epochs, is its
weak model for autoguidance.

The learning rate is 2e-4 for 40 of 800 epochs and then falls linearly. The original stops falling
at 2e-5, ours at 0. The paper's figures (FID 1.51 without guidance) are not verified here.
"""

from configs import common

EPOCH = 1_281_167 / 1024  # steps


def get_config(size: str = ""):
    if size not in ("", "s", "b", "l", "xl"):
        raise ValueError(f"unknown size {size!r}: s, b, l, xl or none, which is xl")
    c = common.get_config((size or "xl").upper(), "1x1@1")
    c.model.latent_size, c.model.channels = 16, 768
    c.model.learn_sigma = False
    c.model.mixer, c.model.ffn = "rope", "swiglu"
    c.model.network = "ddt:width=2048,depth=2,heads=16"
    c.flow.shift = 0.0  # sqrt(768 16 16 / 4096) = 6.93
    c.flow.times = "logit_normal:mean=0,std=1"
    c.data.flip = False
    c.data.batch_size = 1024
    c.optim.lr = 2e-4
    c.optim.b2 = 0.95
    c.optim.clip = 1.0
    c.optim.schedule, c.optim.decay_share = "wsd", 0.95
    c.train.steps = round((14 if size == "s" else 800) * EPOCH)
    c.train.ema = 0.9995
    c.sample.solver, c.sample.steps = "euler", 50
    c.sample.cfg = (1.0,)
    return c
