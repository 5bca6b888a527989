"""HASTE's recipe for ImageNet-256 latents with features and attention of DINOv2-B (docs/repa.md).

    python -m ppflow_jax.main --config=configs/haste.py --config.data.path=DIR --workdir=DIR

Two stages of XL, `:sit` has one. DIR holds latents.npy, labels.npy, teacher.npy (N, 16, 16, 768)
and teacher_attention.npy (N, 4, 12, 256, 256): logits of the teacher's layers 8 to 11.
"""

from configs import imagenet256


def get_config(variant: str = ""):
    if variant not in ("", "sit"):
        raise ValueError(f"unknown variant {variant!r}: sit or none")
    c = imagenet256.get_config("sit_xl" if variant else "ppflow_xl2")
    c.model.learn_sigma = False
    c.data.source = "arrays"
    c.data.fields = ("teacher", "teacher_attention")
    c.flow.terms = ("repa:layer=8,dims=768,hidden=2048", "haste:layers=4/5/6/7,teacher=0/1/2/3")
    c.train.phases = ((250_000, {"repa": 0.5, "haste": 0.5}), (c.train.steps, {}))
    c.optim.clip = 1.0
    return c
