"""PPFlow-B, 2 levels, on ImageNet-256 latents (32x32x4).

    python -m ppflow_jax.main --config=configs/ppflow_b2.py --workdir=DIR \\
        --config.data.source=cache --config.data.path=CACHE

CACHE is the dataset encoded once by ppflow_jax.prepare (README, Data). Parameters: 130.5 M. Cost of
a sample: 62.0% of SiT-B/2's FLOPs. Paper: FID-50K 3.83 (SiT-B/2 under the same training: 4.46). Not
verified here.
"""

from configs import common


def get_config():
    return common.get_config("B", "4x4@0.5,2x2@1")
