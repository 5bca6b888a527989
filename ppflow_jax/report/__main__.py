"""Report of one or several runs: python -m ppflow_jax.report RUN... --out=report.html

One HTML page with everything inside: differences in configuration, curves, metrics, sample grids,
and one sample of every run on its way through the stages.
"""

from __future__ import annotations

from absl import flags

from ppflow_jax import cli
from ppflow_jax.errors import InputError
from ppflow_jax.files.place import place

_OUT = flags.DEFINE_string("out", "report.html", "File to write.")
_TITLE = flags.DEFINE_string("title", "", "Of the page; default: the names of the runs.")
_DECODE = flags.DEFINE_string(
    "decode",
    None,
    "vae:DIR or taesd:DIR, a converted autoencoder; none: false colours; default: as the run's "
    "config.sample.decode.",
)
_LABEL = flags.DEFINE_integer(
    "label", None, "Class of the sample shown in all stages; default: the first that was trained."
)
_SEED = flags.DEFINE_integer("seed", 0, "Its noise.")
_STEPS = flags.DEFINE_integer("steps", 20, "Its Euler steps.")


def main(folders: list[str]) -> None:
    from ppflow_jax.autoencoders.decode import Decoder
    from ppflow_jax.files.disk import atomic, writable_directory
    from ppflow_jax.report.page import page
    from ppflow_jax.report.run import open_runs
    from ppflow_jax.report.strip import make_strip

    runs = open_runs(folders)
    out = place(_OUT.value).absolute()
    if out.is_dir():
        raise InputError(f"--out={out} is a folder: name a file")
    labels = []
    for run in runs:
        classes = run.card.model.num_classes
        trained = run.card.classes.trained(classes)
        labels.append(int(trained[0]) if _LABEL.value is None else _LABEL.value)
        if not 0 <= labels[-1] < classes:
            raise InputError(f"--label={labels[-1]}: {run.name} has classes 0 to {classes - 1}")
    decoders = [Decoder.parse(_DECODE.value or run.decode, run.card) for run in runs]
    writable_directory(out.parent)
    strips = [
        make_strip(run, decoder, label=label, seed=_SEED.value, steps=_STEPS.value)
        for run, decoder, label in zip(runs, decoders, labels)
    ]
    text = page(_TITLE.value or ", ".join(run.name for run in runs), runs, strips)
    with atomic(out) as temporary:
        temporary.write_text(text)
    print(f"{len(runs)} run(s), {len(text) / 1e6:.1f} MB: {out}")


if __name__ == "__main__":
    cli.run(main, positional="RUN...")
