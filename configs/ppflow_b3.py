"""PPFlow-B, 3 levels, on ImageNet-256 latents (32x32x4).

    python -m ppflow_jax.main --config=configs/ppflow_b3.py --workdir=DIR \\
        --config.data.source=cache --config.data.path=CACHE

CACHE is the dataset encoded once by ppflow_jax.prepare (README, Data). Parameters: 130.5 M. Cost of
a sample: 49.1% of SiT-B/2's FLOPs. Paper: FID-50K 4.43. Not verified here.
"""

from configs import common


def get_config():
    return common.get_config("B", "4x4@0.5,4x2@0.75,2x2@1")
