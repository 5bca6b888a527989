"""What an autoencoder makes of photographs, as an npz to evaluate.

    python -m benchmarks.reconstruct --autoencoder=DIR --images=DIR --size=256 --out=FILE.npz

Encodes (mean of the latent) and decodes every picture below a folder after ADM's centre crop, and
writes them rounded to uint8 as `arr_0`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np

from ppflow_jax.autoencoders.autoencoder import Autoencoder, decode_chunked, encode_chunked
from ppflow_jax.autoencoders.decode import load_autoencoder
from ppflow_jax.console import progress
from ppflow_jax.data.images import folder_images
from ppflow_jax.files.disk import atomic


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--autoencoder", required=True, help="converted, docs/weights.md")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chunk", type=int, default=16)
    args = parser.parse_args()
    _, config, params, _ = load_autoencoder(args.autoencoder, ("encoder", "decoder"))
    autoencoder, params = Autoencoder(config), jax.device_put(params)
    images = folder_images(args.images, args.size)
    # Otherwise float32 convolutions are rounded on TPU and on tensor-core GPUs.
    jax.config.update("jax_default_matmul_precision", "highest")
    made = np.empty((images.count, *images.shape), np.uint8)
    error, done = 0.0, 0
    with progress(images.count, 0, "img", "reconstruct") as bar:
        for some in images.batches(args.chunk):
            x = some.astype(np.float32) / 127.5 - 1
            mean, _ = encode_chunked(autoencoder, params, x, chunk=args.chunk)
            y = decode_chunked(autoencoder, params, mean, chunk=args.chunk, uint8=True)
            made[done : done + len(y)] = y
            error += np.sum(np.square((some.astype(np.float64) - y) / 255).mean(axis=(1, 2, 3)))
            done += len(y)
            bar.update(len(y))
    with atomic(args.out) as temporary, temporary.open("wb") as file:
        np.savez(file, arr_0=made)
    psnr = -10 * np.log10(error / done)
    print(f"{images} in {args.out}; {psnr:.2f} dB (of the mean error)")


if __name__ == "__main__":
    main()
