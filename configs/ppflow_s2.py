"""PPFlow-S, 2 levels, on ImageNet-256 latents (32x32x4).

    python -m ppflow_jax.main --config=configs/ppflow_s2.py --workdir=DIR \\
        --config.data.source=cache --config.data.path=CACHE

CACHE is the dataset encoded once by ppflow_jax.prepare (README, Data). Parameters: 32.9 M. Not
verified here.
"""

from configs import common


def get_config():
    return common.get_config("S", "4x4@0.5,2x2@1")
