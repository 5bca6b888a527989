"""One command for an hour with a GPU (or a TPU): everything that is not measured without one.

    python -m benchmarks.gpu_hour --out=DIR [--minutes=10] [--latents=FOLDER] [--parts=parity,...]
    python -m benchmarks.gpu_hour --out=DIR --tiny    # exercised on a CPU: figures mean nothing

Parts, one process each, one after another on the first device:
* parity: forward passes, gradients and samples against float32 on CPU, in float32 and bfloat16;
* attention: what `auto` is and why, cuDNN's program with heads of 64 and 72, and its fallback;
* speed: training steps and sampling of B and XL in bfloat16 beside plain matrix products;
* peer: the same beside compiled PyTorch, if that is installed;
* accelerate: the rows of the table of accelerators, latency beside FLOPs;
* plans: plans of 6 and 8 evaluations against SiT's 50 guided Euler steps;
* training: the time that is left, on latents (folder of latents.npy and labels.npy) or on digits.

Every part has its share of --minutes, compiling included, and writes DIR/PART.json row by row. The
same command continues: what is there is kept, what is missing or failed is done. At the end
DIR/report.md with tables and pictures. Exit code 1 if a part failed or had no time for all rows.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from benchmarks.hour.parts import PARTS
from ppflow_jax import cli
from ppflow_jax.errors import InputError

_OUT = flags.DEFINE_string("out", None, "Folder of records, logs and report.")
_TINY = flags.DEFINE_bool("tiny", False, "Small models and few rounds, to exercise all on a CPU.")
_MINUTES = flags.DEFINE_float("minutes", 10.0, "Of this call, everything included.")
_PARTS = flags.DEFINE_list("parts", [], "Only these.")
_LATENTS = flags.DEFINE_string("latents", "", "latents.npy and labels.npy to train on.")

FOR_REPORT = 0.25  # minutes


def main() -> None:
    from benchmarks.hour.report import write
    from benchmarks.hour.runner import Part, finished, prepare_environment, run
    from benchmarks.hour.work import Settings

    if unknown := [name for name in _PARTS.value if name not in PARTS]:
        raise InputError(f"--parts has {unknown[0]!r}: give some of {','.join(PARTS)}")
    if not _MINUTES.value > FOR_REPORT:
        raise InputError(f"--minutes={_MINUTES.value:g}: more than {FOR_REPORT} is needed")
    latents = _LATENTS.value and str(_folder(Path(_LATENTS.value)))
    settings = Settings(Path(_OUT.value).absolute(), _TINY.value, latents)
    chosen = [Part(n, *given) for n, given in PARTS.items() if n in (_PARTS.value or PARTS)]
    prepare_environment(settings)
    states = run(settings, chosen, _MINUTES.value - FOR_REPORT)
    write(settings, tuple(PARTS))
    print(f"report: {settings.out / 'report.md'}")
    if not finished(states):
        left = ", ".join(n for n, state in states.items() if state not in ("done", "skipped"))
        print(f"not complete: {left}; the same command continues", file=sys.stderr)
        sys.exit(1)


def _folder(path: Path) -> Path:
    """
    Raises:
      InputError: not the folder of the arrays source.
    """
    for name in ("latents.npy", "labels.npy"):
        if not (path / name).is_file():
            raise InputError(f"--latents={path}: no {name} there; see docs/data.md for arrays")
    return path.absolute()


if __name__ == "__main__":
    cli.run(main, required=("out",))
