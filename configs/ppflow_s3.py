"""PPFlow-S, 3 levels, on ImageNet-256 latents (32x32x4).

    python -m ppflow_jax.main --config=configs/ppflow_s3.py --workdir=DIR \\
        --config.data.source=cache --config.data.path=CACHE

CACHE is the dataset encoded once by ppflow_jax.prepare (README, Data). Parameters: 33.0 M. Not
verified here.
"""

from configs import common


def get_config():
    return common.get_config("S", "4x4@0.5,4x2@0.75,2x2@1")
