"""Fit a sampling plan to a model: python -m ppflow_jax.tune --checkpoint=DIR --evaluations=8

    python -m ppflow_jax.tune --checkpoint=RUN --cfg=1,2 --evaluations=8 --out=plan.json
    python -m ppflow_jax.tune --checkpoint=RUN --cfg=1,2 --forecast=branch --steps=20 --full=8
    python -m ppflow_jax.tune --checkpoint=RUN --cfg=1,2 --forecast=harmonica --steps=20 --share=0.4
    python -m ppflow_jax.sample --checkpoint=RUN --plan=plan.json --out=samples
    python -m ppflow_jax.tune --data=CACHE --patches=4x4,2x2

Times, steps of every stage and rows of a multistep rule, from fine trajectories of the same model
and guidance. --flops and --ms are other budgets. With --forecast: --steps of Euler's method, of
which --full are computed and the others forecast from them; or, with harmonica, a --share of their
branches, the others used again. The last needs no model: it proposes the boundaries of a pyramid
from the power spectrum of the data.
"""

from __future__ import annotations

from absl import flags

from ppflow_jax import cli

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir (its latest step) or one step.")
_OUT = flags.DEFINE_string("out", "plan.json", "The plan; its calibration is kept beside it.")
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Which parameters.")
_CFG = flags.DEFINE_list("cfg", ["1"], "Guidance scale: one, or one for every stage.")
_CFG_CHANNELS = flags.DEFINE_integer("cfg_channels", 0, "0: all, or guide only the first N.")
_EVALUATIONS = flags.DEFINE_integer("evaluations", None, "Budget: network evaluations an image.")
_FLOPS = flags.DEFINE_float(
    "flops", None, "Budget: share of the FLOPs of SiT's 50 Euler steps, guided if the plan is."
)
_MS = flags.DEFINE_float("ms", None, "Budget: measured milliseconds an image, batches of 64.")
_FORECAST = flags.DEFINE_enum(
    "forecast",
    None,
    ["branch", "blocks", "velocity", "harmonica"],
    "Forecast the steps that are not full: the branches of every block, what all blocks add, or "
    "the velocity. harmonica: learn which branches of which steps are computed.",
)
_STEPS = flags.DEFINE_integer("steps", None, "With --forecast: Euler steps.")
_FULL = flags.DEFINE_integer("full", None, "With --forecast: how many of the steps are full.")
_SHARE = flags.DEFINE_float(
    "share", None, "With --forecast=harmonica: of the FLOPs of all branches of all steps."
)
_SCHEDULE = flags.DEFINE_enum(
    "schedule",
    "dp",
    ["dp", "magcache", "teacache"],
    "With --forecast: which are full. dp: the cheapest of all choices, by the calibration.",
)
_NOISES = flags.DEFINE_integer("noises", 256, "Trajectories to fit to; half as many are held out.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the calibration's noises.")
_CALIBRATION = flags.DEFINE_string(
    "calibration", None, "Folder of fine trajectories; default: that of --out."
)
_CHOOSE = flags.DEFINE_bool(
    "choose_patches",
    False,
    "Choose the patch of each of --evaluations steps under --flops or --ms, instead of the model's "
    "stages.",
)
_REFINE = flags.DEFINE_bool(
    "refine", True, "Refine rows and step lengths by gradients; without: closed form, in seconds."
)
_FIT_SCALES = flags.DEFINE_bool(
    "fit_scales", False, "Refine the guidance scale of every guided step too."
)
_DATA = flags.DEFINE_string(
    "data", None, "Instead of a model: digits, or the folder of a latent cache or of latents.npy."
)
_PATCHES = flags.DEFINE_string(
    "patches", "4x4,2x2", "Of the levels of --data, coarse to fine, width x height."
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of matrix products.")


def main() -> None:
    if _DATA.value:
        from ppflow_jax.tune.spectrum import proposed

        print(proposed(_DATA.value, _PATCHES.value))
        return
    if not _CHECKPOINT.value:
        raise flags.Error("--checkpoint or --data is required")
    from ppflow_jax.api.load import load
    from ppflow_jax.devices.host_memory import keep_scratch
    from ppflow_jax.tune.asked import Asked
    from ppflow_jax.tune.command import tune

    keep_scratch()
    asked = Asked(
        out=_OUT.value,
        cfg=cli.numbers("cfg", _CFG.value),
        cfg_channels=_CFG_CHANNELS.value,
        evaluations=_EVALUATIONS.value,
        flops=_FLOPS.value,
        ms=_MS.value,
        noises=_NOISES.value,
        seed=_SEED.value,
        calibration=_CALIBRATION.value,
        refine=_REFINE.value,
        fit_scales=_FIT_SCALES.value,
        choose_patches=_CHOOSE.value,
        forecast=_FORECAST.value,
        steps=_STEPS.value,
        full=_FULL.value,
        schedule=_SCHEDULE.value,
        share=_SHARE.value,
    )
    model = load(_CHECKPOINT.value, weights=_WEIGHTS.value, dtype=_DTYPE.value)
    print(tune(model, asked))


if __name__ == "__main__":
    cli.run(main)
