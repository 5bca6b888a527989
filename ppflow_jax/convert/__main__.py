"""Convert weights.

    python -m ppflow_jax.convert --source=SiT-XL-2-256.pt --target=DIR [--pyramid=ppflow3]
    python -m ppflow_jax.convert --source=DIR --target=DIR --pyramid=ppflow2
    python -m ppflow_jax.convert --source=DIR --target=DIR --merge
    python -m ppflow_jax.convert --source=RUN --target=DIR --posthoc_ema=0.15
    python -m ppflow_jax.convert --source=DIR --target=FILE --to=torch

The first makes a checkpoint of a SiT, PPFlow, AutoencoderKL, TAESD or FID Inception file (.pt,
.pth, .bin, .safetensors, an index of several, or a folder with one); nothing in it is run. The
second expands a SiT that was trained or converted here, the third folds adapters into plain
weights, the fourth makes the EMA of another length from those that a run kept, the last goes back
to PyTorch.
"""

from __future__ import annotations

from absl import flags

from ppflow_jax import cli

_SOURCE = flags.DEFINE_list(
    "source", None, "File, index or folder of weights; encoder,decoder of TAESD; checkpoint folder."
)
_TARGET = flags.DEFINE_string("target", None, "New folder; with --to: new file.")
_TO = flags.DEFINE_enum("to", "orbax", ["orbax", "torch", "safetensors"], "What to make.")
_KIND = flags.DEFINE_enum(
    "kind",
    None,
    ["sit", "ppflow", "dico", "vae", "taesd", "inception"],
    "Of the file; default: found from its names.",
)
_WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["ema", "model", "params"], "Entry of a checkpoint; default: ema if there."
)
_ENTRY = flags.DEFINE_string(
    "entry", None, "Where in the file the model is, as ema or ema_model.module; default: found."
)
_PREFIX = flags.DEFINE_string(
    "prefix", None, "What the model's names begin with, below --entry; default: found."
)
_PYRAMID = flags.DEFINE_string(
    "pyramid", None, "Expand a one-stage model: ppflow2, ppflow3, or as 4x4@0.5,4x2@0.75,2x2@1."
)
_MERGE = flags.DEFINE_bool("merge", False, "Fold adapters, and what a base has, into the weights.")
_POSTHOC = flags.DEFINE_float(
    "posthoc_ema", None, "sigma_rel of the EMA to make of those that the run kept, as 0.15."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the level table when expanding.")
_HEADS = flags.DEFINE_integer("heads", None, "Attention heads, where the width is not public.")
_LATENT = flags.DEFINE_integer("latent_size", None, "Where the file has no positions.")
_FFN = flags.DEFINE_string(
    "ffn",
    None,
    "Of a mixture of experts, as moe:experts=8,top_k=1; default: top_k=2 of the file's.",
)
_MIXER = flags.DEFINE_string(
    "mixer", None, "In place of full attention, as clear:radius=16; default: as the names say."
)
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32"], "Round to it; default: as in the file.")
_PATH = flags.DEFINE_string("path", None, "linear, gvp, vp; default: as the file says, or linear.")
_PREDICTION = flags.DEFINE_string(
    "prediction", None, "velocity, score, noise; default: as the file says, or velocity."
)
_SPACE = flags.DEFINE_enum("space", "latents", ["latents", "pixels"], "What the model makes.")
_VAE_CONFIG = flags.DEFINE_string(
    "vae_config", None, "config.json of an AutoencoderKL; default: the one beside the file."
)


def main() -> None:
    from ppflow_jax.convert.command import convert

    convert()


if __name__ == "__main__":
    cli.run(main, required=("source", "target"))
