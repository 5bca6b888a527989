"""Which blocks a stage can do without: python -m ppflow_jax.evaluate.prune --checkpoint=DIR

    python -m ppflow_jax.evaluate.prune --checkpoint=RUN
    python -m ppflow_jax.evaluate.prune --checkpoint=RUN --remove=3,1 --target=weights/students
    python -m ppflow_jax.main --config=digits_ppcl --config.init_from=weights/students

Examples, noised to the times of each stage (t = 0 is noise), pass the model once; linear maps are
fitted to its blocks, and what chains of them make is compared with what the blocks make (CKA).
Writes a JSON file with the blocks in a row that one student may stand for, by stage, a table and a
heat map; with --target a checkpoint that has these students beside the blocks, to be distilled.
"""

from __future__ import annotations

from absl import flags

from ppflow_jax import cli

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir (its latest step) or one step.")
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Which parameters.")
_SOURCE = flags.DEFINE_enum(
    "source",
    None,
    ["arrays", "cache", "digits", "folder", "parquet", "tfds"],
    "Kind of dataset; default: the data that the run was trained on.",
)
_PATH = flags.DEFINE_string("path", "", "Its folder, hf:OWNER/REPO, or the name of a TFDS dataset.")
_SPLIT = flags.DEFINE_string("split", "train", "Split, of tfds and parquet.")
_IMAGE = flags.DEFINE_string("image_feature", "image", "Feature of tfds, column of parquet.")
_LABEL = flags.DEFINE_string("label_feature", "label", "Feature of tfds, column of parquet.")
_VAE = flags.DEFINE_string("vae", "", "vae:DIR or taesd:DIR that encodes pictures of --source.")
_NUM = flags.DEFINE_integer("num", 512, "Examples at most, spread over the dataset.")
_BATCH = flags.DEFINE_integer("batch", 64, "Examples at once, over all devices.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the noise and the times of the examples.")
_REMOVE = flags.DEFINE_list(
    "remove", None, "Blocks to do without: one number, or one of every stage; default: as many as "
    "the losses of CKA say."
)  # fmt: skip
_SHORTEST = flags.DEFINE_integer("shortest", 2, "Blocks that a student stands for, at least.")
_LONGEST = flags.DEFINE_integer("longest", 0, "And at most; 0: any number.")
_FFNS = flags.DEFINE_list(
    "ffns", ["0"], "FFNs to make linear, one number, or one of every stage: those nearest to it."
)
_TARGET = flags.DEFINE_string("target", None, "Folder of a checkpoint with the students.")
_OUT = flags.DEFINE_string("out", None, "JSON file; default: beside the checkpoint.")


def main() -> None:
    from ppflow_jax.evaluate.prune_command import run

    run()


if __name__ == "__main__":
    cli.run(main, required=("checkpoint",))
