"""SiT-XL/2, the one-stage baseline, on ImageNet-256 latents (32x32x4).

    python -m ppflow_jax.main --config=configs/sit_xl.py --workdir=DIR \\
        --config.data.source=cache --config.data.path=CACHE

CACHE is the dataset encoded once by ppflow_jax.prepare (README, Data). Paper (SiT, arXiv
2401.08740): FID-50K 2.15 with guidance (ODE). Not verified here.
"""

from configs import common


def get_config():
    return common.get_config("XL", "2x2@1")
