"""SiT-B/2, the one-stage baseline, on ImageNet-256 latents (32x32x4).

    python -m ppflow_jax.main --config=configs/sit_b.py --workdir=DIR \\
        --config.data.source=cache --config.data.path=CACHE

CACHE is the dataset encoded once by ppflow_jax.prepare (README, Data). Not verified here.
"""

from configs import common


def get_config():
    return common.get_config("B", "2x2@1")
