"""Sample: python -m ppflow_jax.sample --checkpoint=DIR --out=DIR --num=100 --cfg=1,3"""

from __future__ import annotations

import contextlib
import hashlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from ppflow_jax import cli
from ppflow_jax.autoencoders.decode import Decoder
from ppflow_jax.checkpoints.card import Card, read_card
from ppflow_jax.checkpoints.weights import load_weights
from ppflow_jax.console import progress
from ppflow_jax.cost.explain import explain
from ppflow_jax.devices import processes
from ppflow_jax.devices.host_memory import keep_scratch
from ppflow_jax.devices.sharding import local_mesh
from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import locked
from ppflow_jax.files.store import digest, find_checkpoint
from ppflow_jax.flow.plan import GRIDS, SOLVERS, SamplerConfig, evaluations
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.flow.solvers import DIFFUSIONS, LAST_STEPS
from ppflow_jax.generate.folder import SampleFolder
from ppflow_jax.generate.images import MICROBATCH, Generator, choose_labels
from ppflow_jax.generate.noise import load_noise
from ppflow_jax.generate.provenance import ROUNDING, decoded_by, made_from, origin
from ppflow_jax.models.network import Params, make_apply
from ppflow_jax.systems.accelerate import PRESETS, AccelerateConfig, accelerated
from ppflow_jax.train.ema import reminder_of

_DEFAULT = SamplerConfig()
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir (its latest step) or one step.")
_OUT = flags.DEFINE_string("out", None, "Folder for the pictures; one that was begun goes on.")
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Which parameters.")
_LABELS = flags.DEFINE_string(
    "labels",
    "balanced",
    "balanced (the trained classes in turn), uniform (by seed), or numbers or names of classes as "
    "1,2,3.",
)
_NUM = flags.DEFINE_integer("num", None, "Images; default: as many as --labels or --noise.")
_NOISE = flags.DEFINE_string("noise", None, "float32 NHWC .npy of initial noise instead of --seed.")
_SEED = flags.DEFINE_integer("seed", 0, "Image k is a function of (seed, k).")
_BATCH = flags.DEFINE_integer("batch", 64, "Images in flight, over all devices; changes no image.")
_MICROBATCH = flags.DEFINE_integer(
    "microbatch", MICROBATCH, "Images a device computes at once (at most --num); changes last bits."
)
_SOLVER = flags.DEFINE_enum("solver", _DEFAULT.solver, SOLVERS, "ODE or SDE solver.")
_STEPS = flags.DEFINE_integer(
    "steps", _DEFAULT.steps, "Intervals; with --grid=reference the points of linspace(0, 1, N)."
)
_GRID = flags.DEFINE_enum("grid", _DEFAULT.grid, GRIDS, "aligned, or that of the PyTorch code.")
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
_RTOL = flags.DEFINE_float("rtol", _DEFAULT.rtol, "Relative tolerance of dopri5.")
_ATOL = flags.DEFINE_float("atol", _DEFAULT.atol, "Absolute tolerance of dopri5.")
_DIFFUSION = flags.DEFINE_enum("diffusion", _DEFAULT.diffusion, list(DIFFUSIONS), "SDE diffusion.")
_NORM = flags.DEFINE_float("diffusion_norm", _DEFAULT.diffusion_norm, "Factor of the diffusion.")
_LAST = flags.DEFINE_enum("last_step", _DEFAULT.last_step, LAST_STEPS, "Last step of the SDE.")
_LAST_SIZE = flags.DEFINE_float("last_step_size", _DEFAULT.last_step_size, "Its length in time.")
_ACCELERATE = flags.DEFINE_string(
    "accelerate", "exact", f"{', '.join(PRESETS)} or key=value,... (README: Faster)."
)
_EXPLAIN = flags.DEFINE_bool("explain", False, "Print the plan and its cost; do not sample.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of matrix products.")
_DECODE = flags.DEFINE_string(
    "decode", "none", "vae:DIR or taesd:DIR, a converted autoencoder; none: false colours."
)
_SAVE = flags.DEFINE_bool("save_latents", False, "Also write latents.npy and labels.npy.")
_PNGS = flags.DEFINE_bool("pngs", None, "Every image as a PNG; default: up to 1,000 images.")


def main() -> None:
    processes.initialize()
    keep_scratch()
    step_folder = find_checkpoint(_CHECKPOINT.value)
    card = read_card(step_folder)
    apply = make_apply(card.model, dtype=jnp.dtype(_DTYPE.value))
    config, added = _sampler_config(), AccelerateConfig.parse(_ACCELERATE.value)
    segments = accelerated(config, card.model, card.flow, added)
    weak_folder = find_checkpoint(_WEAK.value) if _WEAK.value else None
    weak = _weak_card(weak_folder, card) if weak_folder else None
    sampler = Sampler(
        apply,
        card.model,
        card.flow,
        config,
        segments=segments,
        weak=make_apply(weak.model, dtype=jnp.dtype(_DTYPE.value)) if weak else None,
    )
    if _EXPLAIN.value:
        _say(explain(sampler, card.model, _BATCH.value, weak.model if weak else None))
        return
    if not _OUT.value:
        raise flags.Error("--out is required")
    labels, noise = _labels_and_noise(card)
    decoder = Decoder.parse(_DECODE.value, card)
    generator = Generator(
        sampler,
        decoder,
        microbatch=min(_MICROBATCH.value, len(labels)),
        dtype=_DTYPE.value,
    )
    settings = _settings(step_folder, card, sampler, added, generator, noise, len(labels))
    folder = SampleFolder(_OUT.value, settings)
    nfe = "adaptive" if sampler.config.solver == "dopri5" else evaluations(sampler.segments)
    if folder.complete:
        folder.tidy()
        _say(f"{len(labels)} images, {nfe} NFE each, were complete in {folder.path}")
        return
    params = load_weights(step_folder, card, local_mesh(), _WEIGHTS.value)
    if _WEIGHTS.value == "ema" and (line := reminder_of(step_folder, card)):
        _say(line)
    weaker = load_weights(weak_folder, weak, local_mesh(), _WEIGHTS.value) if weak else None
    first = jax.process_index() == 0
    folder.start(first)
    with locked(folder.path) if first else contextlib.nullcontext():
        results = {
            "nfe": nfe,
            **_sample(folder, generator, (params, weaker), labels, noise),
            **origin(step_folder, card),
            "decode": _DECODE.value,
        }
        if first:
            folder.finish(labels, settings["pngs"], results)
    folder.wait_until_complete()
    seconds, new = results["seconds"], results["images_in_these_seconds"]
    part = "" if new == len(labels) else f" for the last {new}"
    _say(
        f"{len(labels)} images, {nfe} NFE each, {seconds:.1f} s with compilation{part}, "
        f"in {folder.path}"
    )


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text)


def _sampler_config() -> SamplerConfig:
    try:
        cfg = tuple(float(s) for s in _CFG.value)
        until = tuple(float(s) for s in _CFG_UNTIL.value)
        channels = 0 if _CFG_CHANNELS.value == "all" else int(_CFG_CHANNELS.value)
    except ValueError as e:
        raise InputError(
            f"--cfg={','.join(_CFG.value)} --cfg_until={','.join(_CFG_UNTIL.value)} "
            f"--cfg_channels={_CFG_CHANNELS.value}: {e}; write e.g. --cfg=1.0,3.0 "
            "--cfg_until=0.4,1 and --cfg_channels=all or a number"
        ) from e
    if channels < 0:
        raise InputError(f"--cfg_channels must be all or a positive number, got {channels}")
    return SamplerConfig(
        solver=_SOLVER.value,
        steps=_STEPS.value,
        grid=_GRID.value,
        cfg=cfg,
        cfg_until=until,
        cfg_channels=channels,
        rtol=_RTOL.value,
        atol=_ATOL.value,
        diffusion=_DIFFUSION.value,
        diffusion_norm=_NORM.value,
        last_step=_LAST.value,
        last_step_size=_LAST_SIZE.value,
    )


def _weak_card(folder: Path, card: Card) -> Card:
    """Card of the weaker network.

    Raises:
      InputError: it does not predict the same thing at the same times.
    """
    weak = read_card(folder)
    same = {
        "latents": lambda c: c.model.shape,
        "classes": lambda c: c.model.num_classes,
        "path and prediction": lambda c: c.flow,
        "stages": lambda c: c.model.pyramid,
    }
    for what, of in same.items():
        if of(weak) != of(card):
            raise InputError(
                f"--weak={_WEAK.value} has other {what} than --checkpoint ({of(weak)}, not "
                f"{of(card)}): give a smaller or less trained model of the same kind"
            )
    return weak


def _settings(
    step_folder: Path,
    card: Card,
    sampler: Sampler,
    added: AccelerateConfig,
    generator: Generator,
    noise: np.ndarray | None,
    count: int,
) -> dict[str, Any]:
    """Everything that the images depend on; a folder of others is not gone on with."""
    return {
        **made_from(step_folder, _WEIGHTS.value, sampler, card.model.pyramid),
        "weak_sha256": digest(find_checkpoint(_WEAK.value)) if _WEAK.value else None,
        "accelerate": asdict(added),
        "dtype": _DTYPE.value,
        **decoded_by(_DECODE.value),
        "rounding": ROUNDING,
        "seed": _SEED.value,
        "noise_sha256": None if noise is None else hashlib.sha256(noise.tobytes()).hexdigest(),
        "labels": _LABELS.value,
        "num": count,
        "microbatch": generator.microbatch,
        "device": jax.local_devices()[0].device_kind,
        "jax": jax.__version__,
        "save_latents": _SAVE.value,
        "pngs": count <= 1000 if _PNGS.value is None else _PNGS.value,
    }


def _labels_and_noise(card: Card) -> tuple[np.ndarray, np.ndarray | None]:
    """Label of every image and, if given, its noise.

    Raises:
      InputError: labels out of range, or noise of another shape or not finite.
    """
    noise = None
    if _NOISE.value:
        noise = load_noise(Path(_NOISE.value), card.model.shape)
        if _NUM.value not in (None, len(noise)):
            raise InputError(f"--num={_NUM.value}, but {_NOISE.value} holds {len(noise)} images")
    count = len(noise) if noise is not None else _NUM.value
    if count is None:
        count = 16 if _LABELS.value in ("balanced", "uniform") else _LABELS.value.count(",") + 1
    if count < 1 or _BATCH.value < 1:
        raise InputError(f"--num and --batch must be at least 1, got {count} and {_BATCH.value}")
    classes = card.model.num_classes, _SEED.value, card.classes
    return choose_labels(_LABELS.value, count, *classes), noise


def _sample(
    folder: SampleFolder,
    generator: Generator,
    params: tuple[Params, Params | None],
    labels: np.ndarray,
    noise: np.ndarray | None,
) -> dict[str, Any]:
    """All shards that are missing; process 0 returns when those of the others are there too."""
    start = time.monotonic()
    shards = folder.claim(jax.process_index(), jax.process_count())
    done = folder.images_done()
    missing = len(labels) - done
    ids = np.array([k for s in shards for k in folder.images_of(s)], np.int32)
    inputs = (labels[ids], None if noise is None else noise[ids])
    pictures, latents = [], []
    with progress(len(labels), done, "img", "sample") as bar:
        options = dict(seed=_SEED.value, weak=params[1], batch=_BATCH.value)
        for part in generator(params[0], ids, *inputs, **options):
            pictures.extend(part.pictures)
            latents.extend(part.latents)
            while shards and len(pictures) >= (size := len(folder.images_of(shards[0]))):
                folder.write(shards.pop(0), np.stack(pictures[:size]), np.stack(latents[:size]))
                del pictures[:size], latents[:size]
            bar.update(folder.images_done() + len(pictures) - bar.n)
        while jax.process_index() == 0 and not folder.whole():
            time.sleep(0.5)
            bar.update(folder.images_done() - bar.n)
    return {"seconds": time.monotonic() - start, "images_in_these_seconds": missing}


if __name__ == "__main__":
    cli.run(main, required=("checkpoint",))
