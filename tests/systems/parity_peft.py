"""LoRA and DiffFit against arrays of peft and of a port of DiffFit (mkshing/DiffFit-pytorch)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ppflow_jax.convert.infer import find_config
from ppflow_jax.convert.keys import key_table, to_torch
from ppflow_jax.convert.load import from_torch
from ppflow_jax.models.adapters import Adapter, adapter_paths, merge, parse, plain
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.layers import Block
from ppflow_jax.models.network import PPFlow, abstract_params, init_params, make_apply
from ppflow_jax.models.trees import leaves, split
from ppflow_jax.pyramid import SIT
from ppflow_jax.systems.adapters import PRESETS
from tests.acceptance.comparison import Row
from tests.systems.parity_moe import nchw, nhwc

if TYPE_CHECKING:
    from tests.systems_parity import Reference

DIFFFIT = PRESETS["difffit"]
# Linear layers of a block in the PyTorch code, and where adapters stand here
SITES = {
    "attn.qkv": "attention/qkv",
    "attn.proj": "attention/out",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
    "adaLN_modulation.1": "adaln",
}


def rows(ref: Reference) -> Iterator[Row]:
    if "difffit/x" in ref:
        yield from difffit(ref)
    yield from trained(ref)
    if "lora/base/x_embedder.proj.weight" in ref:
        yield from lora(ref)


def difffit(ref: Reference) -> Iterator[Row]:
    """A block with gammas, whose second norm has epsilon 1e-5 as in the port."""
    weights, heads = ref.below("difffit/block"), ref.config["H"]
    width, hidden = ref.config["D"], len(weights["ff.net.0.proj.bias"])
    adapters = parse(DIFFFIT.adapters)
    model = ModelConfig(SIT, 8, 4, width, 1, heads, 1, hidden / width, adapters=adapters)
    make = lambda: PPFlow(model, dtype=jnp.float32, remat="none", rngs=nnx.Rngs(0))
    graph, _ = nnx.split(nnx.eval_shape(make))
    others = jax.tree.map(lambda s: jnp.zeros(s.shape), abstract_params(model))

    @jax.jit
    def run(block, x, c):
        network = nnx.merge(graph, others | {"blocks": block})
        return with_eps(jax.tree.map(lambda leaf: leaf[0], network.blocks), x, jax.nn.silu(c))

    x, c, r = (jnp.asarray(ref[f"difffit/{name}"]) for name in ("x", "c", "cotangent"))
    block = from_port(weights, others["blocks"], heads)
    yield from ref.row("difffit/out", run(block, x, c))
    ones = {k: np.ones_like(v) for k, v in weights.items() if "gamma" in k}
    plain_block = from_port(weights | ones, others["blocks"], heads)
    yield from ref.row("difffit/out_gamma_one", run(plain_block, x, c))
    grads, dx = jax.jit(jax.grad(lambda b, x: jnp.sum(run(b, x, c) * r), (0, 1)))(block, x)
    yield from ref.row("difffit/grad_x", dx)
    for name, ours in to_port(grads):
        yield from ref.row(f"difffit/grad/{name}", ours)


def with_eps(block: Block, x: jax.Array, c: jax.Array, eps: float = 1e-5) -> jax.Array:
    """`block` of these tokens, with another epsilon in its second norm."""
    shift1, scale1, gate1, shift2, scale2, gate2 = (m[:, None] for m in block.modulation(c))

    def norm(x: jax.Array, eps: float) -> jax.Array:
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + eps)

    x = x + gate1 * block.attention(norm(x, 1e-6) * (1 + scale1) + shift1)
    return x + gate2 * block.mlp(norm(x, eps) * (1 + scale2) + shift2)


def from_port(w: dict[str, np.ndarray], shapes: dict[str, Any], heads: int) -> dict[str, Any]:
    """Our leaves of a stack of one block."""
    linear = lambda name: {"kernel": w[f"{name}.weight"].T, "bias": w[f"{name}.bias"]}

    def qkv(name: str) -> np.ndarray:
        each = np.stack([w[name.format(part)].T for part in "qkv"], axis=-2)
        return each.reshape(*each.shape[:-1], heads, -1)

    attention = {
        "qkv_kernel": qkv("attn1.to_{}.weight"),
        "qkv_bias": qkv("attn1.to_{}.bias"),
        "qkv_gamma": qkv("attn1.processor.gamma_{}"),
        "out": linear("attn1.to_out.0") | {"gamma": w["attn1.processor.gamma_fnn"]},
    }
    block = {
        "attention": attention,
        "adaln": linear("norm1.linear"),
        "fc1": linear("ff.net.0.proj"),
        "fc2": linear("ff.net.2"),
        "gates_gamma": np.stack([w["gamma_attn1"], w["gamma_ff"]]),
    }
    return jax.tree.map(lambda leaf, s: jnp.asarray(leaf).reshape(s.shape), block, shapes)


def to_port(grads: dict[str, Any]) -> Iterator[tuple[str, jax.Array]]:
    """Gradients of what the port trains (it trains the kernel of adaLN by accident)."""
    one = jax.tree.map(lambda leaf: leaf[0], grads)
    attention = one["attention"]
    yield from zip(("gamma_attn1", "gamma_ff"), one["gates_gamma"])
    yield "norm1.linear.bias", one["adaln"]["bias"]
    for i, part in enumerate("qkv"):
        yield f"attn1.to_{part}.bias", attention["qkv_bias"][i].ravel()
        yield f"attn1.processor.gamma_{part}", attention["qkv_gamma"][i].ravel()
    yield "attn1.to_out.0.bias", attention["out"]["bias"]
    yield "attn1.processor.gamma_fnn", attention["out"]["gamma"]
    yield "ff.net.0.proj.bias", one["fc1"]["bias"]
    yield "ff.net.2.bias", one["fc2"]["bias"]


def trained(ref: Reference) -> Iterator[Row]:
    """What is trained: by name in a plain DiT, and how much of DiT-XL/2 with 102 classes."""
    if "difffit/trainable_in_plain_DiT" in ref:
        model = ModelConfig(SIT, 8, 4, 16, 1, 2, 5)
        chosen, rest = split(abstract_params(model), DIFFFIT.trainable)
        for tree, name in ((chosen, "trainable"), (rest, "frozen")):
            have = {path for path, _ in leaves(tree)}
            ours = {key.torch for key in key_table(model) if key.path in have}
            theirs = set(json.loads(str(ref[f"difffit/{name}_in_plain_DiT"]))) - {"pos_embed"}
            yield Row(f"peft difffit/{name}_in_plain_DiT", len(ours ^ theirs), 0, "differ")
    if "difffit/counts_DiT_XL_2" not in ref:
        return
    theirs = json.loads(str(ref["difffit/counts_DiT_XL_2"]))
    none, wide = "none", "scale:on=blocks/(attention/(qkv|out)|gates|fc2)"
    for name, adapters, patterns in (
        ("biases_only", none, DIFFFIT.trainable[:2]),
        ("rule_with_102_row_class_table", none, DIFFFIT.trainable),
        ("plus_2D_gammas_in_28_blocks", "scale:on=blocks/gates", DIFFFIT.trainable),
        ("plus_6D_gammas_in_28_blocks", DIFFFIT.adapters, DIFFFIT.trainable),
        ("plus_7D_gammas_in_28_blocks", wide, DIFFFIT.trainable),
    ):
        xl = ModelConfig(SIT, 32, 4, **SIZES["XL"], num_classes=101, adapters=parse(adapters))
        chosen, _ = split(abstract_params(xl), patterns)
        ours = sum(leaf.size for _, leaf in leaves(chosen))
        yield Row(f"peft difffit/counts {name}", abs(ours - theirs[name]), 0, "differ")


def lora(ref: Reference) -> Iterator[Row]:
    """A plain DiT with A and B in every layer of its blocks."""
    state = ref.below("lora/base")
    start, end = "base_model.model.", ".default"
    short = lambda name: name.removeprefix(start).replace(end, "")
    given = {short(name): value for name, value in ref.below("lora/adapter").items()}
    base = find_config(state, "sit", heads=ref.config["H"])
    used = {site for torch, site in SITES.items() if any(f".{torch}.lora_A" in n for n in given)}
    rank, alpha = ref.config["r"], float(ref.config["alpha"])
    x, y = nhwc(ref["lora/x"]), jnp.asarray(ref["lora/y"], jnp.int32)
    t, r = jnp.asarray(ref["lora/t"]), nhwc(ref["lora/cotangent"])

    def output(model: ModelConfig, params: Any) -> jax.Array:
        return make_apply(model)(params, x, t, y, 0)

    params = jax.tree.map(jnp.asarray, from_torch(base, state))
    yield from ref.row("lora/base_out", nchw(jax.jit(output, static_argnums=0)(base, params)))
    for kind in ("lora", "rslora"):
        on = f"blocks/({'|'.join(sorted(used))})"
        model = replace(base, adapters=(Adapter("lora", rank, alpha, kind == "rslora", on),))
        whole = jax.tree.map(jnp.asarray, from_torch(model, state | given))
        run = jax.jit(output, static_argnums=0)
        yield from ref.row(f"lora/out_{kind}", nchw(run(model, whole)))
        merged = merge(model, whole)
        yield from ref.row(f"lora/merged_out_{kind}", nchw(run(plain(model), merged)))
        if kind == "rslora":
            continue
        grads = jax.jit(jax.grad(lambda p, model=model: jnp.sum(output(model, p) * r)))(whole)
        by_name = {short(name): name for name in ref.below("lora/grad")}
        for name, ours in to_torch(model, grads).items():
            if name in by_name:
                yield from ref.row(f"lora/grad/{by_name[name]}", ours)
        for name, ours in to_torch(base, merged).items():
            yield from ref.row(f"lora/merged_weight/{name}", ours)
        yield from lora_names(ref, model)


def lora_names(ref: Reference, model: ModelConfig) -> Iterator[Row]:
    """Names of what is trained, and how large a fresh A may be."""
    own, fresh = adapter_paths(model), to_torch(model, init_params(model, jax.random.key(0)))
    names = {f"base_model.model.{k.torch}" for k in key_table(model) if k.path in own}
    names = {name.replace(".weight", ".default.weight") for name in names}
    if "lora/trainable" in ref:
        theirs = set(json.loads(str(ref["lora/trainable"])))
        yield Row("peft lora/trainable", len(names ^ theirs), 0, "differ")
    if "lora/initial_A_max" in ref:
        for name, (_, bound) in json.loads(str(ref["lora/initial_A_max"])).items():
            short = name.removeprefix("base_model.model.").replace(".default", "")
            largest = float(np.abs(fresh[short]).max())
            yield Row(f"peft lora/initial_A_max {short}", abs(largest / bound - 1), 0.2, "relative")
