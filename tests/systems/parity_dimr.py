"""TD-LN and the multi-resolution loss against arrays of the authors' code (qihao067/DiMR).

Also the whole network of the paper, put together here around these two.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.flow.terms import View
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Output
from ppflow_jax.models.parts import BlockSpec
from ppflow_jax.pyramid import SIT
from ppflow_jax.systems.dimr import Affine, MultiResolution, TdLn, between, pooled, squares
from tests.acceptance.comparison import Row
from tests.systems.parity_moe import nchw, nhwc

if TYPE_CHECKING:
    from tests.systems_parity import Reference

SCALE = 4  # of the original's argument: -4 at data and 4 at noise
KINDS = {"TDLN": TdLn(), "TDRMS": TdLn(rms=True)}
NAMES = {True: {"scale": "scale"}, False: {"scale": "weight", "shift": "bias"}}


def rows(ref: Reference) -> Iterator[Row]:
    for kind, part in KINDS.items():
        if f"layer/{kind}/y_tokens" in ref:
            yield from layer(ref, kind, part)
    if "loss/target" in ref:
        yield from loss(ref)
    models = {name.split("/")[0] for name in ref.arrays if name.startswith("model_")}
    for name in sorted(models):
        if f"{name}/x" in ref:
            yield from network(ref, name)


def leaves_of(weights: dict[str, Any], rms: bool) -> dict[str, Any]:
    """Our leaves of one norm, from tensors of the original."""
    found = {}
    for ours, name in NAMES[rms].items():
        get = lambda rest, name=name: jnp.asarray(weights[f"{name}.{rest}"])
        found[ours] = {
            "ends": jnp.stack([get("param0"), get("param1")]),
            "rate": get("nodecay_weight"),
            "offset": get("nodecay_bias"),
        }
    return found


def norm(part: TdLn, leaves: dict[str, Any], tau: jax.Array, x: jax.Array) -> jax.Array:
    """One norm of [b, ..., d] at times of every sample, by our parts."""
    width = x.shape[-1]
    taus = jnp.broadcast_to(tau[:, None], (len(tau), width))
    theta = {name: between(each, taus) for name, each in leaves.items()}
    shift = theta.get("shift", jnp.zeros_like(theta["scale"]))
    tokens = x.reshape(len(x), -1, width)
    return part(tokens, shift, theta["scale"]).reshape(x.shape)


def layer(ref: Reference, kind: str, part: TdLn) -> Iterator[Row]:
    name = f"layer/{kind}"
    leaves = leaves_of(ref.below(f"{name}/weights"), part.rms)
    tau = jnp.asarray(ref["layer/log_snr_argument"]) / SCALE
    # the times of the flow with which the part gives them
    taus = part.vector((1 - tau) / 2, 3)
    yield Row(f"{ref.name} {name} tau", float(np.abs(taus - tau[:, None]).max()), 1e-6)
    for shape in ("tokens", "grid"):
        if f"layer/x_{shape}" not in ref:
            continue
        x, r = (jnp.asarray(ref[f"layer/{what}_{shape}"]) for what in ("x", "cotangent"))
        run = jax.jit(lambda leaves, x: norm(part, leaves, tau, x))
        yield from ref.row(f"{name}/y_{shape}", run(leaves, x))
        value = lambda leaves, x, r=r: jnp.sum(norm(part, leaves, tau, x) * r)
        grads, of_x = jax.jit(jax.grad(value, (0, 1)))(leaves, x)
        yield from ref.row(f"{name}/grad_x_{shape}", of_x)
        for torch, gradient in torch_names(grads, part.rms).items():
            yield from ref.row(f"{name}/grad_{shape}/{torch}", gradient)
    x = jnp.asarray(ref["layer/x_tokens"])
    alone = jnp.full(len(x), 1.3 / SCALE)
    yield from ref.row(f"{name}/y_same_time_1.3", norm(part, leaves, alone, x))
    one = jnp.full((1, x.shape[-1]), 1.3 / SCALE)
    yield from ref.row(f"{name}/theta_same_time", between(leaves["scale"], one))
    model = ModelConfig(SIT, 8, 4, x.shape[-1], 1, 1, 1, block=BlockSpec(norm=part))
    fresh = Affine(model.width, part.rms)
    first = {
        own: {leaf: getattr(getattr(fresh, own), leaf)[...][0] for leaf in leaves[own]}
        for own in leaves
    }
    yield from ref.row(f"{name}/init_y", norm(part, first, tau, x))


def torch_names(leaves: dict[str, Any], rms: bool) -> dict[str, jax.Array]:
    found = {}
    for ours, name in NAMES[rms].items():
        own = leaves[ours]
        found |= {f"{name}.param{end}": own["ends"][end] for end in range(2)}
        found |= {f"{name}.nodecay_weight": own["rate"], f"{name}.nodecay_bias": own["offset"]}
    return found


def loss(ref: Reference) -> Iterator[Row]:
    """Of one prediction of every resolution; and the term, of one prediction at all of them."""
    target = nhwc(ref["loss/target"])
    side = target.shape[1]
    sizes = sorted(
        int(name.removeprefix("pred_")) for name in ref.below("loss") if "pred_" == name[:5]
    )
    predictions = {size: nhwc(ref[f"loss/pred_{size}"]) for size in sizes}
    for size in sizes:
        yield from ref.row(f"loss/target_{size}", nchw(pooled(target, side // size)))
    coefficients = np.float32(ref["loss/coefficients"])
    ours = [(size / side) ** 2 for size in sizes]
    yield Row(f"{ref.name} loss/coefficients", float(np.abs(coefficients - ours).max()), 1e-7)

    def per_sample(predictions):
        return resolutions(list(predictions.values()), target, coefficients)

    yield from ref.row("loss/loss_per_sample", jax.jit(per_sample)(predictions))
    grads = jax.jit(jax.grad(lambda p: jnp.mean(per_sample(p))))(predictions)
    for size, gradient in grads.items():
        yield from ref.row(f"loss/grad_pred_{size}", nchw(gradient))
    # The loss of the original, of one prediction's own averages
    prediction = predictions[side]
    factors = [side // size for size in sizes]
    whole = resolutions([pooled(prediction, r) for r in factors], target, coefficients)
    view = View(*[None] * 6, {}, {}, 0, (1, 1), error=lambda prediction: prediction - target)
    term = MultiResolution(tuple(r for r in factors if r > 1))
    found = term({}, Output(prediction, {}), view) + squares(prediction - target)
    error = float(np.abs(found - whole).max())
    yield Row(f"{ref.name} loss, one prediction", error, 4e-6 * float(np.abs(whole).max()))


def resolutions(predictions: list[jax.Array], target: jax.Array, coefficients: Any) -> jax.Array:
    """sum_r coefficient_r mean (prediction_r - pool_r(target))^2, per sample; low to high."""
    side = target.shape[1]
    each = (squares(p - pooled(target, side // p.shape[1])) for p in predictions)
    return sum(c * value for c, value in zip(coefficients, each))


class Dimr:
    """The network of the paper, from tensors by their names."""

    def __init__(self, config: dict[str, Any]):
        self.stages = config["stages"]

    def norm(self, w: dict[str, jax.Array], name: str, tau: jax.Array, x: jax.Array) -> jax.Array:
        own = {k.removeprefix(f"{name}."): v for k, v in w.items() if k.startswith(f"{name}.")}
        part = TdLn(rms="scale.param0" in own)
        return norm(part, leaves_of(own, part.rms), tau, x)

    def geglu(self, w, name, tau, x):
        y = self.norm(w, f"{name}.norm", tau, x)
        gate = jax.nn.gelu(dense(w, f"{name}.w0", y), approximate=False)
        return x + dense(w, f"{name}.w2", gate * dense(w, f"{name}.w1", y))

    def attention(self, w, name, tau, x, heads):
        b, n, d = x.shape
        qkv = dense(w, f"{name}.query_key_value", self.norm(w, f"{name}.norm", tau, x))
        q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, heads, d // heads), 2, 0)
        p = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q, k) * (d // heads) ** -0.5, axis=-1)
        y = jnp.einsum("bhqk,bkhe->bqhe", p, v).reshape(b, n, d)
        return x + dense(w, f"{name}.dense", y)

    def block(self, w, name, tau, x, stage):
        """Tokens after the class token of a transformer, [b, h, w, d] of convolutions."""
        if stage["block_type"] == "TransformerBlock":
            x = self.attention(w, f"{name}.block1", tau, x, stage["num_attention_heads"])
        else:
            x = x + convolution(w, f"{name}.block1.1", x, groups=x.shape[-1])
        return self.geglu(w, f"{name}.block2", tau, x)

    def stage(self, w, i, tau, x, y, lower):
        """What the stage predicts, and its input and the outputs of all blocks."""
        stage, name = self.stages[i], f"stages.{i}"
        patch = w[f"{name}.input_layer.1.weight"].shape[-1]
        h = convolution(w, f"{name}.input_layer.1", x, stride=patch)
        grid = h.shape[1:3]
        table = w[f"{name}.input_layer.3.position_embeddings.weight"]
        h = h + table.reshape(1, *grid, -1)
        if lower is not None:
            up, ratio = f"{name}.upsample", grid[0] // lower.shape[1]
            z = dense(w, f"{up}.1.kernel", self.norm(w, f"{up}.0", tau, lower))
            b, rows, columns, _ = z.shape
            z = z.reshape(b, rows, columns, ratio, ratio, -1).transpose(0, 1, 3, 2, 4, 5)
            h = h + self.norm(w, f"{up}.2", tau, z.reshape(b, *grid, -1))
        tokens = stage["block_type"] == "TransformerBlock"
        picture = lambda h: h[:, 1:].reshape(len(h), *grid, -1) if tokens else h
        if tokens:
            label = w[f"{name}.class_embeds.weight"][y][:, None]
            h = jnp.concatenate([label, h.reshape(len(h), -1, h.shape[-1])], axis=1)
        half, found, skips = stage["num_blocks"] // 2, [picture(h)], []
        for k in range(2 * half + 1):
            if k > half:
                joined = jnp.concatenate([h, skips.pop()], axis=-1)
                h = dense(w, f"{name}.skip_denses.{k - half - 1}", joined)
            h = self.block(w, f"{name}.blocks.{k}", tau, h, stage)
            if k < half:
                skips.append(h)
            found.append(picture(h))
        out = self.norm(w, f"{name}.output_layer.0", tau, picture(h))
        return convolution(w, f"{name}.output_layer.2", out), jnp.concatenate(found, axis=-1)

    def __call__(self, w, x, tau, y):
        """Predictions, low to high, and what the last but one stage gives to the last."""
        outputs, lower, given = [], None, None
        for i in range(len(self.stages)):
            given = lower
            out, lower = self.stage(w, i, tau, x, y, lower)
            outputs.append(out)
        return outputs, given


def dense(w: dict[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
    y = x @ w[f"{name}.weight"].T
    return y + jnp.expand_dims(w[f"{name}.bias"], range(y.ndim - 1)) if f"{name}.bias" in w else y


def convolution(
    w: dict[str, jax.Array], name: str, x: jax.Array, *, stride=0, groups=1
) -> jax.Array:
    """With zeros around; patches where there is a stride."""
    kernel = w[f"{name}.weight"]
    side = kernel.shape[-1] // 2
    y = jax.lax.conv_general_dilated(
        x,
        kernel.transpose(2, 3, 1, 0),
        (stride or 1,) * 2,
        "VALID" if stride else ((side, side),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return y + w[f"{name}.bias"].reshape(1, 1, 1, -1)


def network(ref: Reference, name: str) -> Iterator[Row]:
    model = Dimr(json.loads(str(ref[f"{name}/config"])))
    weights = jax.tree.map(jnp.asarray, ref.below(f"{name}/weights"))
    x, target = nhwc(ref[f"{name}/x"]), nhwc(ref[f"{name}/noise_target"])
    tau, y = jnp.asarray(ref[f"{name}/log_snr_argument"]) / SCALE, jnp.asarray(ref[f"{name}/y"])
    sizes = [(s["max_height"] / x.shape[1]) ** 2 for s in model.stages]

    def run(weights, tau=tau):
        outputs, given = model(weights, x, tau, y)
        value = resolutions(outputs, target, sizes)
        return jnp.mean(value), (outputs, given, value)

    grads, (outputs, given, value) = jax.jit(jax.grad(run, has_aux=True))(weights)
    yield from ref.row(f"{name}/out_low", nchw(outputs[0]))
    yield from ref.row(f"{name}/out_high", nchw(outputs[-1]))
    yield from ref.row(f"{name}/skips_low", given)
    yield from ref.row(f"{name}/loss_per_sample", value)
    alone = jnp.full(len(x), tau[1])  # the second of the batch, at which the original ran it
    outputs = jax.jit(lambda w: model(w, x, alone, y)[0])(weights)
    yield from ref.row(f"{name}/out_high_same_time", nchw(outputs[-1]))
    for torch, gradient in grads.items():
        yield from ref.row(f"{name}/grad/{torch}", gradient)
