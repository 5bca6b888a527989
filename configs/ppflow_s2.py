"""python -m ppflow_jax.main --config=configs/ppflow_s2.py --workdir=DIR: see imagenet256.py."""

from configs import imagenet256


def get_config():
    return imagenet256.get_config("ppflow_s2")
