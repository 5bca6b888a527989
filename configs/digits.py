"""Handwritten digits (scikit-learn, 1,797 images of 8x8 pixels): the demo, without download.

    python -m ppflow_jax.main --config=configs/digits.py --workdir=runs/digits

`configs/digits.py:sit` is the one-stage baseline, `:levels3` has three stages. `:lora`, `:difffit`,
`:bitfit` and `:diffscaler` train a part of two stages made from a SiT (docs/adapters.md); they need
`--config.init_from`.
"""

from configs import common
from ppflow_jax.systems.adapters import PRESETS, tune

PYRAMIDS = {"": "4x4@0.5,2x2@1", "sit": "2x2@1", "levels3": "4x4@0.5,4x2@0.75,2x2@1"}
PARTS = PRESETS.keys() - {"full"}


def get_config(variant: str = ""):
    if variant not in PYRAMIDS and variant not in PARTS:
        known = [*filter(None, PYRAMIDS), *sorted(PARTS)]
        raise ValueError(f"unknown variant {variant!r}: {', '.join(known)} or none")
    c = common.get_config("S", PYRAMIDS.get(variant, PYRAMIDS[""]))
    c.model.update(dict(latent_size=8, channels=1, num_classes=10, width=128, depth=6, heads=4))
    c.model.learn_sigma = False
    c.model.dtype = "float32"
    c.data.source, c.data.space = "digits", "pixels"
    c.optim.lr = 1e-3
    c.optim.warmup_steps = 50
    c.optim.schedule = "cosine"
    c.train.steps = 600
    c.train.ema = 0.99
    c.train.log_every = 10
    c.train.save_every = 100
    c.sample.every = 200
    c.sample.count = 100
    c.sample.steps = 20
    c.sample.cfg = (2.0,)
    return tune(c, variant) if variant in PARTS else c
