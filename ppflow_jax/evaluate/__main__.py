"""Judge samples: python -m ppflow_jax.evaluate --samples=FILE.npz --reference=DIR --features=DIR

    python -m ppflow_jax.evaluate --checkpoint=DIR --num=10000 --reference=DIR --features=DIR
    python -m ppflow_jax.evaluate --reference=DIR --features=DIR --statistics_out=FILE.npz
    python -m ppflow_jax.evaluate --reference=digits --train_features=DIR

The second samples first, as the run's configuration does. The third keeps the statistics of a
dataset, the last trains a small feature network on one.
"""

from __future__ import annotations

from absl import flags

from ppflow_jax import cli

_SAMPLES = flags.DEFINE_string("samples", None, "npz with arr_0, folder of images, or digits.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir or step to sample from instead.")
_NUM = flags.DEFINE_integer("num", 10_000, "Samples of --checkpoint, its classes in turn.")
_DECODE = flags.DEFINE_string("decode", "none", "vae:DIR or taesd:DIR for a model of latents.")
_PLAN = flags.DEFINE_string(
    "plan", None, "File of `ppflow tune` for --checkpoint, instead of the run's own sampler."
)
_REFERENCE = flags.DEFINE_string(
    "reference", None, "The same, or an npz with mu and sigma: what samples are compared with."
)
_FEATURES = flags.DEFINE_string(
    "features",
    None,
    "Folder of an Inception (docs/weights.md) or of --train_features; digits: trained on the spot.",
)
_METRICS = flags.DEFINE_list(
    "metrics", [], "Of fid, sfid, is, precision, recall, kid; default: all that can be had."
)
_RESIZE = flags.DEFINE_enum(
    "resize", "tf1", ["tf1", "torch"], "To 299x299, as ADM's evaluator or as pytorch-fid."
)
_SIZE = flags.DEFINE_integer("size", None, "ADM's centre crop of the images in folders.")
_OUT = flags.DEFINE_string("out", None, "JSON file; default: beside the samples.")
_STATISTICS_OUT = flags.DEFINE_string(
    "statistics_out", None, "Write mean and covariance of the reference to this new npz."
)
_TRAIN_FEATURES = flags.DEFINE_string(
    "train_features", None, "Train a feature network on the labelled reference, in this new folder."
)
_BATCH = flags.DEFINE_integer("batch", 64, "Images at once, over all devices.")
_SEED = flags.DEFINE_integer(
    "seed", None, "Of samples, KID's subsets, --train_features; default: the run's, or 0."
)


def main() -> None:
    from ppflow_jax.evaluate.command import judge

    judge()


if __name__ == "__main__":
    cli.run(main, required=("reference",))
