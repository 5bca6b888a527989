"""Sample: python -m ppflow_jax.sample --checkpoint=DIR --out=DIR --num=100 --cfg=1,3"""

from __future__ import annotations

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from ppflow_jax import cli
from ppflow_jax.accelerate.config import PRESETS, AccelerateConfig, accelerated
from ppflow_jax.checkpoint import Card, find_checkpoint, load_weights, read_card
from ppflow_jax.decode import Decoder
from ppflow_jax.errors import InputError
from ppflow_jax.explain import explain
from ppflow_jax.files import atomic, writable_directory
from ppflow_jax.flow.plan import GRIDS, SOLVERS, SamplerConfig, evaluations
from ppflow_jax.flow.sampler import Sampler, image_noise
from ppflow_jax.flow.solvers import DIFFUSIONS, LAST_STEPS
from ppflow_jax.models.ppflow import make_apply
from ppflow_jax.sharding import batch_sharding, data_shards, make_mesh
from ppflow_jax.writers import progress, save_grid, save_png

_DEFAULT = SamplerConfig()
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir (its latest step) or one step.")
_OUT = flags.DEFINE_string("out", None, "Folder for the pictures; made if needed.")
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Which parameters.")
_LABELS = flags.DEFINE_list("labels", [], "Classes, repeated in order up to --num; default: all.")
_NUM = flags.DEFINE_integer("num", None, "Images; default: as many as --labels or --noise.")
_NOISE = flags.DEFINE_string("noise", None, "float32 NHWC .npy of initial noise instead of --seed.")
_SEED = flags.DEFINE_integer("seed", 0, "Image k is a function of (seed, k).")
_BATCH = flags.DEFINE_integer("batch", 64, "Images sampled at once, over all devices.")
_SOLVER = flags.DEFINE_enum("solver", _DEFAULT.solver, SOLVERS, "ODE or SDE solver.")
_STEPS = flags.DEFINE_integer(
    "steps", _DEFAULT.steps, "Intervals; with --grid=reference the points of linspace(0, 1, N)."
)
_GRID = flags.DEFINE_enum("grid", _DEFAULT.grid, GRIDS, "aligned, or that of the PyTorch code.")
_CFG = flags.DEFINE_list("cfg", ["1"], "Guidance scale: one, or one for every stage.")
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
_PNGS = flags.DEFINE_bool("pngs", True, "Write every image as a PNG, not only the grid.")


def main() -> None:
    step_folder = find_checkpoint(_CHECKPOINT.value)
    card = read_card(step_folder)
    config = _sampler_config()
    apply = make_apply(card.model, dtype=jnp.dtype(_DTYPE.value))
    segments = accelerated(config, card.model, card.flow, AccelerateConfig.parse(_ACCELERATE.value))
    sampler = Sampler(apply, card.model, card.flow, config, segments=segments)
    if _EXPLAIN.value:
        print(explain(sampler, card.model, _BATCH.value))
        return
    labels, noise = _labels_and_noise(card)
    decoder = Decoder.parse(_DECODE.value, card)
    mesh = make_mesh()
    params = load_weights(step_folder, card, mesh, _WEIGHTS.value)
    out = writable_directory(_OUT.value)

    start = time.monotonic()
    with jax.default_matmul_precision("highest" if _DTYPE.value == "float32" else "default"):
        latents = _sample(sampler, params, card, labels, noise, mesh)
    seconds = time.monotonic() - start
    if bad := int(np.sum(~np.isfinite(latents).all(axis=(1, 2, 3)))):
        raise InputError(
            f"{bad} of {len(latents)} images are not finite: the weights may have diverged; "
            "try --dtype=float32, more --steps or a lower --cfg"
        )
    with jax.default_matmul_precision("highest"):  # else TPUs round the decoder's convolutions
        _write(out, latents, labels, decoder)
    nfe = "adaptive" if config.solver == "dopri5" else evaluations(sampler.segments)
    print(f"{len(latents)} images, {nfe} NFE each, {seconds:.1f} s with compilation, in {out}")


def _sampler_config() -> SamplerConfig:
    try:
        cfg = tuple(float(s) for s in _CFG.value)
        channels = 0 if _CFG_CHANNELS.value == "all" else int(_CFG_CHANNELS.value)
    except ValueError as e:
        raise InputError(
            f"--cfg={','.join(_CFG.value)} --cfg_channels={_CFG_CHANNELS.value}: {e}; "
            "write --cfg=1.0,3.0 and --cfg_channels=all or a number"
        ) from e
    if channels < 0:
        raise InputError(f"--cfg_channels must be all or a positive number, got {channels}")
    return SamplerConfig(
        solver=_SOLVER.value,
        steps=_STEPS.value,
        grid=_GRID.value,
        cfg=cfg,
        cfg_channels=channels,
        rtol=_RTOL.value,
        atol=_ATOL.value,
        diffusion=_DIFFUSION.value,
        diffusion_norm=_NORM.value,
        last_step=_LAST.value,
        last_step_size=_LAST_SIZE.value,
    )


def _labels_and_noise(card: Card) -> tuple[np.ndarray, np.ndarray | None]:
    """Label of every image and, if given, its noise.

    Raises:
      InputError: labels out of range, or noise of another shape or not finite.
    """
    classes = card.model.num_classes
    try:
        given = [int(s) for s in _LABELS.value] or list(range(classes))
    except ValueError as e:
        raise InputError(f"--labels={','.join(_LABELS.value)}: write numbers, e.g. 1,2,3") from e
    if wrong := [y for y in given if not 0 <= y <= classes]:
        raise InputError(
            f"--labels has {wrong[0]}: the model has classes 0 to {classes - 1} "
            f"(and {classes} for none)"
        )
    noise = None
    if _NOISE.value:
        noise = _load_noise(Path(_NOISE.value), card.model.shape)
        if _NUM.value not in (None, len(noise)):
            raise InputError(f"--num={_NUM.value}, but {_NOISE.value} holds {len(noise)} images")
    count = len(noise) if noise is not None else _NUM.value
    if count is None:
        count = len(given) if _LABELS.value else 16
    if count < 1 or _BATCH.value < 1:
        raise InputError(f"--num and --batch must be at least 1, got {count} and {_BATCH.value}")
    return np.resize(np.int32(given), count), noise


def _load_noise(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    try:
        noise = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise InputError(f"cannot read --noise={path} ({e}): give a float32 NHWC .npy") from e
    if noise.dtype != np.float32 or noise.shape[1:] != shape or not len(noise):
        raise InputError(
            f"--noise={path} is {noise.dtype} {noise.shape}, the model needs float32 (N, "
            f"{', '.join(map(str, shape))})"
        )
    if not np.isfinite(noise).all():
        raise InputError(f"--noise={path} has values that are NaN or infinite: make it anew")
    return noise


def _sample(sampler, params, card, labels, noise, mesh) -> np.ndarray:
    """All latents, in batches of one shape (the last one padded)."""
    shards = data_shards(mesh)
    batch = -(-min(_BATCH.value, len(labels)) // shards) * shards
    place = batch_sharding(mesh)
    latents, bar = [], progress(len(labels), 0, "img", "sample")
    for first in range(0, len(labels), batch):
        ids = np.arange(first, first + batch)
        x, keys = image_noise(_SEED.value, ids, card.model.shape)
        if noise is not None:
            x = noise[np.minimum(ids, len(noise) - 1)]
        y = labels[np.minimum(ids, len(labels) - 1)]
        x, y, keys = jax.device_put((x, y, keys), place)
        done = np.asarray(sampler(params, x, y, keys))[: len(labels) - first]
        latents.append(done)
        bar.update(len(done))
    bar.close()
    return np.concatenate(latents)


def _write(out: Path, latents: np.ndarray, labels: np.ndarray, decoder: Decoder) -> None:
    folder, shown, k = out / "images", [], 0
    if _PNGS.value:
        folder.mkdir(exist_ok=True)
    for pictures in decoder.pictures(latents):
        shown.extend(pictures[: max(0, 100 - len(shown))])
        for picture in pictures if _PNGS.value else ():
            save_png(folder / f"{k:06d}_class{labels[k]}.png", picture)
            k += 1
        if not _PNGS.value and len(shown) == 100:
            break
    save_grid(out / "grid.png", np.stack(shown), columns=min(10, len(shown)))
    if _SAVE.value:
        for name, array in {"latents": latents, "labels": labels}.items():
            with atomic(out / f"{name}.npy") as temporary, temporary.open("wb") as file:
                np.save(file, array)


if __name__ == "__main__":
    cli.run(main, required=("checkpoint", "out"))
