"""SiT-L/2, the one-stage baseline, on ImageNet-256 latents (32x32x4).

    python -m ppflow_jax.main --config=configs/sit_l.py --workdir=DIR --config.data.path=LATENTS

LATENTS holds latents.npy and labels.npy. Not verified here.
"""

from configs import common


def get_config():
    return common.get_config("L", "2x2@1")
