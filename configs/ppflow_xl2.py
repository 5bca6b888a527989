"""PPFlow-XL, 2 levels, on ImageNet-256 latents (32x32x4).

    python -m ppflow_jax.main --config=configs/ppflow_xl2.py --workdir=DIR \\
        --config.data.source=cache --config.data.path=CACHE

CACHE is the dataset encoded once by ppflow_jax.prepare (README, Data). Parameters: 675.1 M. Cost of
a sample: 62.6% of SiT-XL/2's FLOPs. Paper: FID-50K 1.99, fine-tuned from SiT-XL/2 (2.15). Not
verified here.
"""

from configs import common


def get_config():
    return common.get_config("XL", "4x4@0.5,2x2@1")
