"""SiT and PPFlow of every size on ImageNet-256 latents (32x32x4): a name of the table.

    python -m ppflow_jax.main --config=configs/imagenet256.py:ppflow_b2 --workdir=DIR \\
        --config.data.source=cache --config.data.path=CACHE

CACHE is the dataset encoded once by ppflow_jax.prepare (docs/data.md). `configs/ppflow_b2.py` and
so on are the same. FLOPs are of one sample, of SiT of that size; FIDs (50,000 samples) are those of
the papers (arXiv 2506.23543, 2401.08740) and not verified here.

| name | parameters | FLOPs | FID |
|---|---|---|---|
| sit_s, sit_b, sit_l, sit_xl | | 100% | B 4.46 (trained as PPFlow), XL 2.15 (guided, ODE) |
| ppflow_s2, ppflow_s3 | 32.9 M, 33.0 M | | |
| ppflow_b2, ppflow_b3 | 130.5 M | 62.0%, 49.1% | 3.83, 4.43 |
| ppflow_l2, ppflow_l3 | 458.1 M, 458.3 M | | |
| ppflow_xl2, ppflow_xl3 | 675.1 M, 675.2 M | 62.6%, 49.4% | 1.99, 2.23, fine-tuned from SiT-XL |
"""

from configs import common

PYRAMIDS = {"sit": "2x2@1", "2": "4x4@0.5,2x2@1", "3": "4x4@0.5,4x2@0.75,2x2@1"}
NAMES = {f"sit_{size}": (size, "sit") for size in ("s", "b", "l", "xl")} | {
    f"ppflow_{size}{levels}": (size, levels) for size in ("s", "b", "l", "xl") for levels in "23"
}


def get_config(name: str = ""):
    if name not in NAMES:
        raise ValueError(f"configs/imagenet256.py:NAME, one of {', '.join(NAMES)}")
    size, levels = NAMES[name]
    return common.get_config(size.upper(), PYRAMIDS[levels])
