"""What blocks know of classes: python -m ppflow_jax.evaluate.probe --checkpoint=DIR

    python -m ppflow_jax.evaluate.probe --checkpoint=RUN --blocks=2,4 --times=0.5,0.9 --pools=2x2

Labelled examples are noised to every time (t = 0 is noise), pass the stage of that time with the
null class, and a linear head tells the classes from the tokens after every block. Writes a table, a
JSON file and a heat map of the accuracy on examples that no head was trained on.
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
_BLOCKS = flags.DEFINE_list("blocks", ["all"], "Blocks, counted from 1, or all.")
_TIMES = flags.DEFINE_list("times", ["0.3", "0.5", "0.7", "0.8", "0.9"], "Times, 0 is noise.")
_POOLS = flags.DEFINE_list(
    "pools", ["mean"], "mean over tokens, or means over RxC areas side by side, as 2x2."
)
_HEADS = flags.DEFINE_list("heads", ["ridge"], "Of ridge (closed form) and linear (DDAE's).")
_NUM = flags.DEFINE_integer("num", 5000, "Examples at most, spread over the dataset.")
_BATCH = flags.DEFINE_integer("batch", 64, "Examples at once, over all devices.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the noise of the examples and of linear heads.")
_OUT = flags.DEFINE_string("out", None, "JSON file; default: beside the checkpoint.")


def main() -> None:
    from ppflow_jax.evaluate.probe_command import run

    run()


if __name__ == "__main__":
    cli.run(main, required=("checkpoint",))
