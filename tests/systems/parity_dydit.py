"""DyDiT against arrays of the authors' code (alibaba-damo-academy/DyDiT)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ppflow_jax.convert.keys import to_torch
from ppflow_jax.models.conditions import split
from ppflow_jax.models.config import SIZES, ModelConfig
from ppflow_jax.models.network import PPFlow
from ppflow_jax.models.stack import Stack
from ppflow_jax.pyramid import SIT
from ppflow_jax.systems.dydit import DyDiT, Noise, spent, switched
from ppflow_jax.systems.dydit_training import flops_loss, flops_target
from tests.acceptance.comparison import Row
from tests.systems.parity_moe import Model, nchw, nhwc

if TYPE_CHECKING:
    from tests.systems_parity import Reference

WEIGHT = 0.1  # of sum(out * r) in what they took the gradient of
SCHEDULES = {"lam05": (0.5, 1000), "lam07": (0.7, 5000)}
SHOWN = "DiT-B/2"  # whose constants are in `flops_loss`
TARGETS = (0.4, 0.5, 0.7, 1.0)


def rows(ref: Reference) -> Iterator[Row]:
    """Times are their steps n: the network takes any number."""
    if "model/x_embedder.proj.weight" in ref:
        model = DyDiTModel(ref, "model")
        yield from evaluated(ref, model)
        yield from trained(ref, model)
    if "eval/temb" in ref:
        yield from widths(ref)
    if "train/attn_mask" in ref:
        yield from costs(ref)
    if "ste/logit" in ref:
        yield from straight_through(ref)
    for name, settings in SCHEDULES.items():
        if f"schedule/{name}" in ref:
            steps, theirs = ref[f"schedule/{name}"].T
            ours = [float(flops_target(int(step), *settings)) for step in steps]
            error = float(np.max(np.abs(ours - theirs)))
            yield Row(f"{ref.name} schedule/{name}", error, 2e-7)


class DyDiTModel(Model):
    def run(self, params, x, t, y, noise: Noise | None = None) -> dict[str, jax.Array]:
        """Everything the arrays have, as one program."""
        net: PPFlow = nnx.merge(self.graph, params)
        part, told = self.config.block.wrap, split((), y)
        stack = Stack(net.blocks, (), net.run, net.remat)
        signals, _ = net.signals(stack, t, *(() if noise is None else (noise,)))
        h, (c,) = net.tokens(x, 0, told), net.embeddings((t,), (told,), (0,))
        silu, hidden, logits, tokens = jax.nn.silu(c), [], [], []
        for i in range(self.config.depth):
            block = jax.tree.map(lambda leaf, i=i: leaf[i], net.blocks)
            block.given(jax.tree.map(lambda s, i=i: s[i], signals), (0, 0))
            entering = h
            h, (attention, _), _ = block.outputs(h, silu)
            middle = entering + block.modulation(silu)[2][:, None] * attention
            logits.append(block.dydit.token_logits(middle))
            tokens.append(switched(logits[-1], None if noise is None else noise.tokens[i]))
            hidden.append(h)
        side = self.config.latent_size // 2
        out = net.final(h, silu, 0).reshape(len(x), side, side, 2, 2, -1)
        out = out.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), 2 * side, 2 * side, -1)
        time = net.time(t)
        widths = part.logits(stack.leaves(part.kind), time)
        by_image = lambda each: jnp.swapaxes(jnp.stack([*each]), 0, 1)
        return {
            "out": nchw(out),
            "hidden": jnp.stack(hidden),
            "temb": time,
            "token_logits": by_image(logits)[..., None],
            "attn_logits": by_image(widths["heads"]),
            "mlp_logits": by_image(widths["hidden"]),
            "attn_mask": by_image(signals["heads"]),
            "mlp_mask": by_image(signals["hidden"]),
            "token_mask": by_image(tokens)[..., None],
        }


def evaluated(ref: Reference, model: DyDiTModel) -> Iterator[Row]:
    x, y = nhwc(ref["run/x"]), jnp.asarray(ref["run/y"], jnp.int32)
    t = jnp.asarray(ref["run/t"], jnp.float32)
    found = jax.jit(model.run)(model.params, x, t, y)
    for name, value in found.items():
        yield from ref.row(f"eval/{name}", _bool(value) if name.endswith("mask") else value)
    logits = [np.abs(found[f"{name}_logits"]).min() for name in ("attn", "mlp", "token")]
    yield from ref.row("eval/margin", min(logits), times=100)
    side = (model.config.latent_size // 2) ** 2
    like = Noise.drawn(jnp.zeros(len(x), jnp.uint32), model.config, 0)
    assert like.tokens.shape[-1] == side
    whole = jax.jit(model.run)(model.params, x, t, y, Noise.complete(like))
    yield from ref.row("eval/complete_out", whole["out"])


def widths(ref: Reference) -> Iterator[Row]:
    """What the time decides, from its embedding."""
    part, weights = DyDiT(), ref.below("model")
    leaves: dict[str, Any] = {"heads": {}, "hidden": {}}
    for key in part.keys(0):
        router, leaf = key.path[2:]
        if router in leaves:
            name = key.torch.removeprefix("blocks.0.")
            each = [key.ours(weights[f"blocks.{i}.{name}"]) for i in range(ref.config["L"])]
            leaves[router][leaf] = jnp.stack(each)
    temb = jnp.asarray(ref["eval/temb"])
    logits = part.logits(leaves, temb)
    masks, _ = part.signals(leaves, lambda t: temb, jnp.zeros(len(temb)))
    for torch, name in (("attn", "heads"), ("mlp", "hidden")):
        ours = jnp.swapaxes(logits[name], 0, 1)
        yield from ref.row(f"eval/{torch}_logits", ours, what="from the embedding")
        ours = _bool(jnp.swapaxes(masks[name], 0, 1))
        yield from ref.row(f"eval/{torch}_mask", ours, what="from the embedding")


def trained(ref: Reference, model: DyDiTModel) -> Iterator[Row]:
    if "train/noise/0/attn_e1" not in ref:
        return
    x, y = nhwc(ref["run/x"]), jnp.asarray(ref["run/y"], jnp.int32)
    t = jnp.asarray(ref["run/t"], jnp.float32)
    noise = Noise(*(_noise(ref, name, model.config.depth) for name in ("attn", "mlp", "token")))
    r, target, constants = ref["run/cotangent"], float(ref["train/target"]), _constants(ref)[SHOWN]

    def loss(params):
        found = model.run(params, x, t, y, noise)
        rate = rate_of(*(found[f"{name}_mask"] for name in ("attn", "mlp", "token")), *constants)
        return WEIGHT * jnp.sum(found["out"] * r) + flops_loss(rate, target), (found, rate)

    grads, (found, rate) = jax.jit(jax.grad(loss, has_aux=True))(model.params)
    yield from ref.row("train/out", found["out"])
    yield from ref.row("train/flops_rate", rate, what="network")
    yield from ref.row("train/flops_loss", flops_loss(rate, target), what="network")
    for name in ("attn_mask", "mlp_mask", "token_mask"):
        yield from ref.row(f"train/{name}", _bool(found[name]))
    for name, value in to_torch(model.config, grads).items():
        yield from ref.row(f"train/grad/{name}", value)


def rate_of(heads, hidden, tokens, attention: float, mlp: float) -> jax.Array:
    """F of masks [b, depth, ...]."""
    shares = (jnp.mean(heads, -1), jnp.mean(hidden, -1), jnp.mean(tokens, (-2, -1)))
    return jnp.mean(spent(*shares, attention, mlp))


def costs(ref: Reference) -> Iterator[Row]:
    """What is made of given masks."""
    names, constants = ("attn", "mlp", "token"), _constants(ref)
    masks = [jnp.float32(ref[f"train/{name}_mask"]) for name in names]
    target = float(ref["train/target"])
    one = jax.jit(lambda *masks: flops_loss(rate_of(*masks, *constants[SHOWN]), target))
    yield from ref.row("train/flops_rate", rate_of(*masks, *constants[SHOWN]))
    yield from ref.row("train/flops_loss", one(*masks))
    for name, grad in zip(names, jax.grad(one, (0, 1, 2))(*masks)):
        yield from ref.row(f"train/flops_grad/{name}_mask", grad)
    table = [[flops_loss(rate_of(*masks, *c), t) for t in TARGETS] for c in constants.values()]
    yield from ref.row("train/flops_loss_table", np.asarray(table))
    for name, theirs in constants.items():
        model = ModelConfig(SIT, 32, 4, num_classes=1000, **SIZES[name.split("-")[1].split("/")[0]])
        block = model.block
        ours = block.mixer.flops(model, 0, 256) / 2e9, block.ffn.flops(model, 256) / 2e9
        error = float(np.max(np.abs(np.subtract(ours, theirs))))
        yield Row(f"{ref.name} train/flops_constants {name}", error, 1e-12)


def straight_through(ref: Reference) -> Iterator[Row]:
    logit, noise = jnp.asarray(ref["ste/logit"]), jnp.asarray(_logistic(ref, "ste/"))
    yield from ref.row("ste/value", _bool(switched(logit, noise)))
    yield from ref.row("ste/eval_value", _bool(switched(logit)))
    value = lambda logit: jnp.sum(switched(logit, noise) * ref["ste/cotangent"])
    yield from ref.row("ste/grad", jax.grad(value)(logit))


def _bool(mask: Any) -> np.ndarray:
    """Of a mask that must have no other values than 0 and 1."""
    mask = np.asarray(mask)
    assert set(np.unique(mask)) <= {0.0, 1.0}, np.unique(mask)
    return mask > 0


def _noise(ref: Reference, name: str, depth: int) -> jax.Array:
    layers = [_logistic(ref, f"train/noise/{i}/{name}_") for i in range(depth)]
    return jnp.stack([jnp.asarray(e).reshape(len(e), -1) for e in layers])


def _logistic(ref: Reference, prefix: str) -> np.ndarray:
    """Of two exponential draws."""
    first, second = (np.float64(ref[f"{prefix}e{i}"]) for i in (1, 2))
    return np.float32(np.log(second) - np.log(first))


def _constants(ref: Reference) -> dict[str, tuple[float, float]]:
    found = json.loads(str(ref["train/flops_constants"]))
    return {name: (each["attn"], each["mlp"]) for name, each in found.items()}
