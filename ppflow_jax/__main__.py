"""Train, convert and sample pyramidal flows: ppflow COMMAND --flag=value ...

    ppflow train --config=digits --workdir=runs/digits
    ppflow sample --checkpoint=runs/digits --out=samples --num=100 --cfg=2
    ppflow COMMAND --help

`python -m ppflow_jax.sample` is the same as `ppflow sample`, and so on.
"""

from __future__ import annotations

import difflib
import runpy
import sys
import textwrap

import ppflow_jax
from ppflow_jax.cli import packaged

COMMANDS = {
    "train": ("main", "train a model, or continue a run; --dry_run only compiles it"),
    "sample": ("sample", "make pictures from a checkpoint, or explain what that would cost"),
    "evaluate": ("evaluate", "FID and its relatives of samples or of a checkpoint"),
    "probe": ("evaluate.probe", "what the blocks of a model know of classes, by a linear head"),
    "prune": ("evaluate.prune", "which blocks a stage can do without, and students for them"),
    "convert": ("convert", "PyTorch weights to a checkpoint and back; a SiT to a pyramid"),
    "rank": ("convert.rank", "order hidden units by importance, before a model is cut in slices"),
    "prepare": ("prepare", "encode a dataset of pictures once, to train on its latents"),
    "tune": ("tune", "fit a sampling plan to a model: fewer steps for the same error"),
    "serve": ("serve", "pictures over HTTP, and a page to play with"),
    "report": ("report", "one HTML page of one or several runs"),
    "push": ("report.push", "publish a run on the Hugging Face hub, with a page about it"),
    "bench": ("bench", "time training steps and sampling with random weights"),
}


def main() -> None:
    name, rest = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if name in ("--help", "-h", "help"):
        print(usage())
    elif name == "--version":
        print(f"ppflow_jax {ppflow_jax.__version__}")
    elif name in COMMANDS:
        sys.argv = [f"ppflow {name}", *rest]
        runpy.run_module(f"ppflow_jax.{COMMANDS[name][0]}", run_name="__main__", alter_sys=True)
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        print(f"ppflow: no command {name}: {hint}one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


def usage() -> str:
    """What there is."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    configs = sorted(path.stem for path in packaged("configs").glob("[!_]*.py"))
    configs.remove("common")
    return "\n".join(
        [
            (__doc__ or "").strip(),
            "",
            "Commands:",
            *lines,
            "",
            *textwrap.wrap(f"Configs: {', '.join(configs)}", 100, subsequent_indent="  "),
            f"Scripts for SLURM, Kubernetes and TPU pods: {packaged('launch')}",
        ]
    )


if __name__ == "__main__":
    main()
