"""What public runs reached of the peak of their chips: sources of estimates, nothing is ours.

Shares are of the peak in bfloat16, of the FLOPs that a model needs (recomputed ones not counted).
Images/s of DiT-XL/2 are converted by three forward passes of 237 GFLOPs an image.
"""

from __future__ import annotations

from typing import NamedTuple


class Share(NamedTuple):
    """A share of peak, and the run that reached it."""

    value: float
    source: str


class Reached(NamedTuple):
    """The most of public training runs on a kind of chip, and what diffusion transformers reach."""

    best: Share
    diffusion: Share


_MAXTEXT = "AI-Hypercomputer/maxtext"
_FOUNDRY = "mosaicml/llm-foundry, scripts/train/benchmarking"
_WAN = Share(0.296, "Wan2.1-14B, v5p-8, 135.9 TFLOP/s (AI-Hypercomputer/maxdiffusion)")
_TRILLIUM = Share(0.503, f"Llama 3.1 70B, 256 v6e ({_MAXTEXT}, docs/reference/models/tiering.md)")
_HOPPER = Reached(
    Share(0.464, f"7B language model, 8 H100 ({_FOUNDRY})"),
    Share(0.205, "LightningDiT-XL/1, 64 epochs in about 10 h on 8 H800 (hustvl/LightningDiT)"),
)
_ADA = Reached(
    Share(0.628, "DiT of width 768, RTX 4080, 442 images/s (AshishKumar4/dew)"),
    Share(0.548, "GPT-2 124M, RTX 4090, 29% of an A100's peak (karpathy/nanoGPT#182)"),
)

# Where nothing is public for a chip, the nearest kind stands in, and its source says so.
REACHED = {
    "v5e": Reached(Share(0.669, f"32B, 256 v5e ({_MAXTEXT}, configs/v5e)"), _WAN),
    "v5p": Reached(Share(0.654, f"Llama 2 70B, 512 v5p ({_MAXTEXT}, tiering.md)"), _WAN),
    "v6e": Reached(_TRILLIUM, _WAN),
    "tpu7x": Reached(_TRILLIUM, _WAN),
    "a100": Reached(
        Share(0.642, f"7B language model, 8 A100 80 GB ({_FOUNDRY})"),
        Share(0.245, "DiT-XL/2, one A100, 0.84 steps/s of 128 (chuanyangjin/fast-DiT)"),
    ),
    "h100": _HOPPER,
    "h200": _HOPPER,
    "rtx4090": _ADA,
    "l4": _ADA,
}


class Run(NamedTuple):
    """A public training run of DiT-XL/2 or of the same cost an image.

    Attributes:
      chip, count: a name of `REACHED`, and how many.
      batch: images of a step, over all devices.
      note: what explains a difference.
    """

    name: str
    chip: str
    count: int
    batch: int
    images_per_second: float
    note: str


RUNS = (
    Run(
        "LightningDiT-XL/1 (hustvl/LightningDiT)",
        *("h100", 8, 1024, 64 * 1_281_167 / 36_000),
        "H800, an H100 with 400 GB/s of NVLink; sets the slow end, by definition",
    ),
    Run(
        "OpenDiT XL/2 (hpcaitech/Open-Sora, docs/acceleration.md)",
        *("h100", 8, 1024, 8 * 175.0),
        "H800, PyTorch without compilation; the plain DiT beside it 800 images/s",
    ),
    Run(
        "fast-DiT XL/2 (chuanyangjin/fast-DiT)",
        *("a100", 1, 128, 0.84 * 128),
        "checkpointing, not in the count; sets the slow end, by definition",
    ),
    Run(
        "DiT-XL/2, author's PyTorch (facebookresearch/DiT#22)",
        *("a100", 8, 256, 0.81 * 256),
        "TF32, whose peak is half, and no fused attention",
    ),
)
