"""Train: python -m ppflow_jax.main --config=configs/ppflow_b2.py --workdir=DIR [--config.a.b=v]

With --dry_run=tpu:v5e:4x4 nothing is trained: the run is compiled for those devices, and what it
would need is printed. Exit code 1 if it does not fit their memory.
"""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from ppflow_jax import cli
from ppflow_jax.errors import RunError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment, a file in configs/.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; a run found there continues.")
_DRY_RUN = flags.DEFINE_string(
    "dry_run",
    None,
    "Only compile, for devices that need not be there: cpu:8, 8xH100, tpu:v5e:4x4, ..., or here.",
)


def main() -> None:
    import jax

    from ppflow_jax.cost import dry_run, report_text, targets
    from ppflow_jax.devices import processes
    from ppflow_jax.devices.host_memory import keep_scratch
    from ppflow_jax.train.init_from import take_architecture
    from ppflow_jax.train.loop import train

    config, told = _CONFIG.value, [name for name in flags.FLAGS if name.startswith("config.")]
    if _DRY_RUN.value:
        target = targets.Target.parse(_DRY_RUN.value)
    elif not _WORKDIR.value:
        raise flags.Error("--workdir is required")
    else:
        processes.initialize()
        keep_scratch()
    line = take_architecture(config, _WORKDIR.value, told)
    if line and jax.process_index() == 0:
        print(line, flush=True)
    if not _DRY_RUN.value:
        train(config, _WORKDIR.value)
        return
    report = dry_run.dry_run(config, target)
    print(report_text.text(report), flush=True)
    if report.misfit:
        raise RunError(report.misfit)


if __name__ == "__main__":
    cli.run(main, required=("config",))
