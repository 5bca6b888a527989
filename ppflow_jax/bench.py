"""Speed with random weights: python -m ppflow_jax.bench --size=B --work=train,sample

Measures SiT and PPFlow of 2 and 3 levels side by side: a training step, and sampling. Prints a
table and, with --json, writes all figures. Nothing else should run on the machine; the rows are
timed in turn, and ratios are taken within a round, so that a slow spell hits both sides.

With --calibrate it times a few small programs instead and keeps what they took in
~/.cache/ppflow_jax, for `ppflow train --dry_run=here`: hours of a run on this machine.
"""

from __future__ import annotations

from absl import flags

from ppflow_jax import cli

_SIZE = flags.DEFINE_list("size", ["B"], "Model sizes of S, B, L, XL.")
_WORK = flags.DEFINE_list("work", ["sample"], "train, sample or both.")
_LATENT = flags.DEFINE_integer("latent_size", 32, "Side of the latent (4 channels).")
_BATCH = flags.DEFINE_integer("batch", 1, "Images sampled at once.")
_TRAIN_BATCH = flags.DEFINE_integer("train_batch", 8, "Images of a training step.")
_SOLVER = flags.DEFINE_enum("solver", "euler", ["euler", "heun"], "Solver.")
_STEPS = flags.DEFINE_integer("steps", 4, "Intervals of the aligned grid.")
_CFG = flags.DEFINE_float("cfg", 1.5, "Guidance scale of every guided stage.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds; every round times every row once.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of matrix products.")
_ATTENTION = flags.DEFINE_enum(
    "attention",
    "auto",
    ["auto", "xla", "deferred", "cudnn", "splash"],
    "As config.model.attention.",
)
_REMAT = flags.DEFINE_enum("remat", "none", ["none", "dots", "full"], "As config.model.remat.")
_CALIBRATE = flags.DEFINE_bool(
    "calibrate", False, "Measure this machine, in --dtype and --rounds, for --dry_run=here."
)
_JSON = flags.DEFINE_string("json", None, "File for all figures.")


def main() -> None:
    from ppflow_jax.cost.command import compare

    compare()


if __name__ == "__main__":
    cli.run(main)
