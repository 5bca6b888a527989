"""Train: python -m ppflow_jax.main --config=configs/ppflow_b2.py --workdir=DIR [--config.a.b=v]"""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from ppflow_jax import cli, distributed
from ppflow_jax.train import train

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment, a file in configs/.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; a run found there goes on.")


def main() -> None:
    distributed.initialize()
    train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    cli.run(main, required=("config", "workdir"))
