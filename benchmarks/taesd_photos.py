"""TAESD with its trained weights on real photographs: reconstruction and published latents.

    python -m benchmarks.taesd_photos --weights=DIR --images DIR... --count=60 --out=DIR \
        [--latents=FILE.npz --root=DIR]

Prints the PSNR (dB, on unrounded images in [0, 1]) of every photograph after ADM's centre crop to
256 x 256 and the mean per folder, writes a PNG grid of originals above reconstructions, and
compares latents of 128 x 128 images (PIL bicubic resize) with a file of stored ones
(`latents` uint8 with z = (u8 / 255 - 0.5) * 6, `files` relative to `--root`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from ppflow_jax.autoencoders.autoencoder import Autoencoder, decode_chunked, encode_chunked
from ppflow_jax.convert.autoencoder_keys import autoencoder_config, autoencoder_params
from ppflow_jax.data.transforms import to_uint8


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's crop: halve with a box filter while at least 2x too large, bicubic, cut the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def psnr(original: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """10 log10(1 / mean squared error) per image, in dB, for images in [-1, 1]."""
    error = ((original.astype(np.float64) - decoded) / 2) ** 2
    return -10 * np.log10(error.mean(axis=(1, 2, 3)))


def write_grid(path: Path, rows: list[np.ndarray]) -> None:
    """One PNG of image rows, written under a temporary name first."""
    picture = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    partial = path.with_suffix(".partial")
    Image.fromarray(picture).save(partial, format="PNG")
    partial.rename(path)


def photographs(folder: Path, count: int) -> list[Path]:
    """`count` files (0: all) spread evenly over the sorted names of a folder tree."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpeg", ".jpg", ".png"))
    if count and len(files) > count:
        files = [files[i * len(files) // count] for i in range(count)]
    return files


def reconstruct(autoencoder: Autoencoder, params: dict, folder: Path, args) -> dict:
    """PSNR of every photograph of a folder, and the grid of the first ones."""
    files = photographs(folder, args.count)
    pixels = [center_crop(Image.open(f).convert("RGB"), args.size) for f in files]
    small = [min(Image.open(f).size) < args.min_side for f in files]
    images = np.stack(pixels).astype(np.float32) / 127.5 - 1
    mean, _ = encode_chunked(autoencoder, params, images, chunk=args.chunk)
    decoded = decode_chunked(autoencoder, params, mean, chunk=args.chunk)
    figures = psnr(images, decoded)
    for file, figure, is_small in zip(files, figures, small, strict=True):
        print(f"{figure:6.2f} dB  {file.name}{'  (small, not in the mean)' if is_small else ''}")
    kept = figures[~np.asarray(small)]
    print(f"{kept.mean():6.2f} dB  mean of {len(kept)} photographs of {folder}\n")
    rows = []
    for start in range(0, min(len(files), args.grid), 8):
        part = slice(start, start + 8)
        row = [np.stack(pixels[part]), np.asarray(to_uint8(jax.numpy.asarray(decoded[part])))]
        if len(row[0]) == 8:
            rows += row
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"reconstruction_{folder.parent.name}_{folder.name}.png"
    if rows:
        write_grid(path, rows)
    return {"folder": str(folder), "mean": float(kept.mean()), "count": len(kept)}


def compare_latents(autoencoder: Autoencoder, params: dict, args) -> dict:
    """Encode the photographs that are there and compare with the stored uint8 latents."""
    with np.load(args.latents) as file:
        stored, names = file["latents"], [str(name) for name in file["files"]]
    index = [i for i, name in enumerate(names) if (args.root / name).exists()]
    wrong = worst = values = 0
    for start in range(0, len(index), 500):
        part = index[start : start + 500]
        photos = [Image.open(args.root / names[i]).convert("RGB") for i in part]
        side = 8 * stored.shape[1]
        photos = [np.asarray(p.resize((side, side), Image.Resampling.BICUBIC)) for p in photos]
        images = np.stack(photos).astype(np.float32) / 127.5 - 1
        mean, _ = encode_chunked(autoencoder, params, images, chunk=args.chunk)
        steps = np.clip((mean.astype(np.float64) / 6 + 0.5) * 255, 0, 255)
        worst = max(worst, float(np.abs(steps - stored[part]).max()))
        wrong += int((np.rint(steps) != stored[part]).sum())
        values += steps.size
    if not index:
        raise SystemExit(f"none of the photographs that {args.latents} names are under {args.root}")
    figures = {"photographs": len(index), "max_steps": worst, "exact": 1 - wrong / values}
    print(
        f"{len(index)} of {len(names)} photographs of {args.latents.name} are there: "
        f"max |z - stored| = {worst:.5f} steps of 6/255 (rounding alone: 0.5), "
        f"{wrong} of {values} values round to another step"
    )
    return figures


def main() -> None:
    """Parse the flags and run both checks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--weights", type=Path, required=True, help="taesd_{en,de}coder.safetensors"
    )
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="folders of photographs")
    parser.add_argument("--count", type=int, default=60, help="photographs per folder, 0 for all")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--min_side", type=int, default=128, help="smaller ones leave the mean")
    parser.add_argument("--latents", type=Path, help="npz of stored latents")
    parser.add_argument("--root", type=Path, help="folder that its file names start from")
    parser.add_argument("--grid", type=int, default=16, help="photographs in the PNG")
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.latents and not args.root:
        parser.error("--latents needs --root, the folder that its file names start from")

    params = {}
    for half in ("encoder", "decoder"):
        state = load_file(args.weights / f"taesd_{half}.safetensors")
        config = autoencoder_config("taesd", state)
        params |= autoencoder_params("taesd", state, config)
    autoencoder = Autoencoder(config)
    # Otherwise float32 convolutions are rounded on TPU and on tensor-core GPUs.
    jax.config.update("jax_default_matmul_precision", "highest")

    report = {"reconstruction": [reconstruct(autoencoder, params, f, args) for f in args.images]}
    if args.latents:
        report["latents"] = compare_latents(autoencoder, params, args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "taesd_photos.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
