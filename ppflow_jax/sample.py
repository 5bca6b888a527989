"""Sample: python -m ppflow_jax.sample --checkpoint=DIR --out=DIR --num=100 --cfg=1,3"""

from __future__ import annotations

from typing import Any

from absl import flags

from ppflow_jax import cli
from ppflow_jax.errors import InputError

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir (its latest step) or one step.")
_OUT = flags.DEFINE_string("out", None, "Folder for the pictures; one that was begun continues.")
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Which parameters.")
_LABELS = flags.DEFINE_string(
    "labels",
    "balanced",
    "balanced (the trained classes in turn), uniform (by seed), or numbers or names of classes as "
    "1,2,3.",
)
_NUM = flags.DEFINE_integer(
    "num", None, "Images; default: as many as --labels, --noise or --conditions."
)
_NOISE = flags.DEFINE_string("noise", None, "float32 NHWC .npy of initial noise instead of --seed.")
_SEED = flags.DEFINE_integer("seed", 0, "Image k is a function of (seed, k).")
_REQUESTS = flags.DEFINE_string(
    "requests",
    None,
    'File with a line such as {"label": 3, "seed": 7, "guidance": 2} for every picture.',
)
_CONDITIONS = flags.DEFINE_string(
    "conditions",
    None,
    "Of a model that takes them, values by image number: FILE.npz with an array of each name, or a "
    "folder with NAME.npy or a folder NAME of pictures.",
)
_BATCH = flags.DEFINE_integer("batch", 64, "Images in flight, over all devices; changes no image.")
_MICROBATCH = flags.DEFINE_integer(
    "microbatch", 16, "Images a device computes at once (at most --num); changes last bits."
)
_SOLVER = flags.DEFINE_string(
    "solver",
    "heun",
    "euler, midpoint, heun, heun3, rk4, ab2, ab3, ab4, dpm++2m, unipc2, dopri5 (adaptive), "
    "sde-euler, sde-heun, or meanflow (of models trained with that objective).",
)
_STEPS = flags.DEFINE_integer(
    "steps", 50, "Intervals; with --grid=reference the points of linspace(0, 1, N)."
)
_GRID = flags.DEFINE_string(
    "grid", "aligned", "aligned to the stages, or reference: that of the PyTorch code."
)
_CFG = flags.DEFINE_list("cfg", ["1"], "Guidance scale: one, or one for every stage.")
_CFG_UNTIL = flags.DEFINE_list(
    "cfg_until", [], "Times up to which each of --cfg holds, the last one 1; default: the stages'."
)
_WEAK = flags.DEFINE_string(
    "weak",
    None,
    "Autoguidance: a weaker checkpoint of the same latents in place of the null class.",
)
_CFG_CHANNELS = flags.DEFINE_string("cfg_channels", "all", "all, or guide only the first N.")
_RTOL = flags.DEFINE_float("rtol", 1e-3, "Relative tolerance of dopri5.")
_ATOL = flags.DEFINE_float("atol", 1e-6, "Absolute tolerance of dopri5.")
_DIFFUSION = flags.DEFINE_string(
    "diffusion",
    "sigma",
    "Of the SDE: constant, sbdm, sigma, linear, decreasing or increasing-decreasing.",
)
_NORM = flags.DEFINE_float("diffusion_norm", 1.0, "Factor of the diffusion.")
_LAST = flags.DEFINE_string(
    "last_step", "mean", "Last step of the SDE: none, mean, tweedie or euler."
)
_LAST_SIZE = flags.DEFINE_float("last_step_size", 0.04, "Its length in time.")
_KEEP = flags.DEFINE_enum(
    "keep",
    None,
    ["end", "steps"],
    "Of a model for inpainting: put what is known in its place at the end, or before all steps.",
)
_ACCELERATE = flags.DEFINE_string(
    "accelerate",
    "exact",
    "exact, balanced, fast, key=value,... (docs/accelerate.md), or auto: the run's plan.json.",
)
_PLAN = flags.DEFINE_string(
    "plan", None, "File of `ppflow tune`: times, stages, guidance and rows of every step."
)
_EXPLAIN = flags.DEFINE_bool("explain", False, "Print the plan and its cost; do not sample.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of matrix products.")
_DECODE = flags.DEFINE_string(
    "decode", "none", "vae:DIR or taesd:DIR, a converted autoencoder; none: false colours."
)
_SAVE = flags.DEFINE_bool("save_latents", False, "Also write latents.npy and labels.npy.")
_PNGS = flags.DEFINE_bool("pngs", None, "Every image as a PNG; default: up to 1,000 images.")


def main() -> None:
    import jax

    from ppflow_jax.api.folder import Request, sample_into
    from ppflow_jax.api.model import Model
    from ppflow_jax.api.requests import read_lines
    from ppflow_jax.checkpoints.weights import open_weights
    from ppflow_jax.console import say
    from ppflow_jax.devices import processes
    from ppflow_jax.devices.host_memory import keep_scratch
    from ppflow_jax.files.copies import given
    from ppflow_jax.generate.conditions import load_conditions
    from ppflow_jax.generate.noise import load_noise

    processes.initialize()
    keep_scratch()
    model, weak = (
        path and Model(open_weights(path, _WEIGHTS.value), _DTYPE.value)
        for path in (_CHECKPOINT.value, _WEAK.value or None)
    )
    plan = _plan_of(model, weak)
    for note in plan.notes:
        say(note)
    if _EXPLAIN.value:
        lines = [plan.explain(_BATCH.value)]
    elif not _OUT.value:
        raise flags.Error("--out is required")
    else:
        if _REQUESTS.value:
            _check_alone("requests", ("num", "labels", "noise", "seed"))
        request = Request(
            num=_NUM.value,
            labels=_LABELS.value,
            seed=_SEED.value,
            noise=load_noise(given(_NOISE.value), model.config.shape) if _NOISE.value else None,
            conditions=load_conditions(given(_CONDITIONS.value), model.config)
            if _CONDITIONS.value
            else None,
            lines=read_lines(_REQUESTS.value, model) if _REQUESTS.value else None,
            decode=_DECODE.value,
            microbatch=_MICROBATCH.value,
            batch=_BATCH.value,
            save_latents=_SAVE.value,
            pngs=_PNGS.value,
        )
        lines = sample_into(_OUT.value, model, plan, request)
    if jax.process_index() == 0:
        print(*lines, sep="\n")


# Flags that a plan file decides
_DECIDED = (
    *("steps", "solver", "accelerate", "weak", "grid", "cfg_until", "cfg_channels"),
    *("rtol", "atol", "diffusion", "diffusion_norm", "last_step", "last_step_size", "keep"),
)


def _plan_of(model: Any, weak: Any) -> Any:
    """By a file, or by the flags; with --accelerate=auto by those that are given."""
    file, auto = _PLAN.value, _ACCELERATE.value == "auto"
    present = [name for name in _DECIDED if flags.FLAGS[name].present]
    if file and present:
        given = ", ".join(f"--{name}" for name in present)
        raise InputError(f"--plan decides {given}: leave that out, or the file")
    settings = {
        "steps": _STEPS.value,
        "solver": _SOLVER.value,
        "accelerate": _ACCELERATE.value,
        "weak": weak,
        "grid": _GRID.value,
        "cfg_until": cli.numbers("cfg_until", _CFG_UNTIL.value),
        "cfg_channels": _channels(_CFG_CHANNELS.value),
        "rtol": _RTOL.value,
        "atol": _ATOL.value,
        "diffusion": _DIFFUSION.value,
        "diffusion_norm": _NORM.value,
        "last_step": _LAST.value,
        "last_step_size": _LAST_SIZE.value,
        "keep": _KEEP.value,
    }
    if file or auto:
        settings = {name: settings[name] for name in present}
    cfg = cli.numbers("cfg", _CFG.value)
    return model.plan(file, cfg=cfg if flags.FLAGS["cfg"].present else None, **settings)


def _check_alone(name: str, others: tuple[str, ...]) -> None:
    """A file says for every picture what these flags say for all."""
    if given := [f"--{other}" for other in others if flags.FLAGS[other].present]:
        raise InputError(f"--{name} says this for every picture: leave out {', '.join(given)}")


def _channels(text: str) -> int:
    if text == "all":
        return 0
    if not text.isascii() or not text.isdigit() or not int(text):
        raise InputError(f"--cfg_channels={text}: write all or a number from 1 on")
    return int(text)


if __name__ == "__main__":
    cli.run(main, required=("checkpoint",))
