"""PPFlow-L, 3 levels, on ImageNet-256 latents (32x32x4).

    python -m ppflow_jax.main --config=configs/ppflow_l3.py --workdir=DIR \\
        --config.data.source=cache --config.data.path=CACHE

CACHE is the dataset encoded once by ppflow_jax.prepare (README, Data). Parameters: 458.3 M. Not
verified here.
"""

from configs import common


def get_config():
    return common.get_config("L", "4x4@0.5,4x2@0.75,2x2@1")
