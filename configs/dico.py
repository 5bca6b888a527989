"""DiCo of every size on ImageNet-256 latents (32x32x4), without attention (docs/dico.md).

    python -m ppflow_jax.main --config=configs/dico.py:b --workdir=DIR \\
        --config.data.source=cache --config.data.path=CACHE

Sizes are s, b, l, xl and h. Trained as SiT is, on the velocity of a linear path; `:b,ddpm` predicts
the noise of DDPM as the public weights do, which start it by `--config.init_from`. `:b,levels2` has
2x2 patches until t = 0.5. The paper (arXiv 2505.11196) trains 400,000 steps of 256 images at a rate
of 1e-4 without weight decay, to FIDs of 49.97, 27.20, 13.66 and 11.67 without guidance (S, B, L,
XL; not verified here).
"""

from configs import common
from ppflow_jax.systems.dico_network import SIZES

VARIANTS = ("ddpm", "levels2")


def get_config(name: str = "s"):
    size, _, variant = name.partition(",")
    if size.upper() not in SIZES or (variant and variant not in VARIANTS):
        raise ValueError(
            f"unknown variant {name!r}: {', '.join(s.lower() for s in SIZES)}, and after a comma "
            f"{' or '.join(VARIANTS)}"
        )
    c = common.get_config("S", "2x2@0.5,1x1@1" if variant == "levels2" else "1x1@1")
    sizes = dict(SIZES[size.upper()])
    depths = sizes.pop("depths")
    c.model.update(sizes | dict(depth=sum(depths), heads=1))
    c.model.network = f"dico:depths={'/'.join(map(str, depths))}"
    if variant == "ddpm":
        c.model.network += ",time=ddpm"
        c.flow.path, c.flow.prediction = "vp", "noise"
    return c
