"""DiT^DH against arrays of the authors' code (bytetriper/RAE).

Their time runs from data (0) to noise (1): t is 1 - t of ours, and the velocity is minus ours.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ppflow_jax.convert.infer import find_config
from ppflow_jax.convert.keys import to_torch
from ppflow_jax.convert.load import from_torch
from ppflow_jax.flow.guidance import Auto, Cfg
from ppflow_jax.flow.loss import Draws, FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig, Segment
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.flow.times import Law, LogitNormal, shifted
from ppflow_jax.models.conditions import split
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.layers import Execution
from ppflow_jax.models.network import make_apply
from ppflow_jax.models.patch import positions
from ppflow_jax.models.trees import put
from ppflow_jax.pyramid import Pyramid
from ppflow_jax.systems.ddt import DDT
from ppflow_jax.systems.ddt_blocks import NormedBlock, angles
from ppflow_jax.systems.ddt_network import WideHead
from ppflow_jax.systems.registry import take_block
from tests.acceptance.comparison import Row
from tests.systems.sit_reference import close, gradient_rows, nchw, nhwc

if TYPE_CHECKING:
    from tests.systems_parity import Reference

FORWARD, SAMPLED = 1e-5, 2e-5  # of the README, relative
LAST = 0.999  # of raw noise times; the original leaves the rest out
ONE = Pyramid.parse("1x1@1")
CASES = ("main", "weak", "alt")


def rows(ref: Reference) -> Iterator[Row]:
    models = {case: Model(ref, case) for case in CASES if f"{case}/t_embedder.W" in ref}
    if not models and "weak/blocks.0.attn.qkv.weight" in ref:
        yield from first_block(ref)
    for model in models.values():
        yield from model.file()
        yield from model.forward()
    if "main" in models and "train/x1" in ref:
        yield from training(ref, models["main"])
    if "main" in models and "weak" in models:
        yield from guidance(ref, models["main"], models["weak"])
        for kind in ("plain", "autoguidance", "cfg"):
            yield from sampled(ref, kind, models["main"], models["weak"])


def first_block(ref: Reference) -> Iterator[Row]:
    """Of the encoder of `weak` alone, which is what a selection has."""
    settings, size = ref.config["weak"], ref.config["grid"]
    block = take_block({"mixer": "rope", "ffn": "swiglu"})
    sizes = dict(width=settings["hidden_size"][0], depth=1, heads=settings["num_heads"][0])
    own = ModelConfig(ONE, size, ref.config["C"], **sizes, num_classes=1, block=block)
    make = lambda: NormedBlock(own, Execution(), rms=True, rngs=nnx.Rngs(0))
    graph, _ = nnx.split(nnx.eval_shape(make))
    leaves: dict[Any, Any] = {}
    for key in DDT().block_keys(own, "blocks", 0):
        put(leaves, key.path[1:], jnp.asarray(key.ours(ref[f"weak/{key.torch}"])))
    embedded = jnp.asarray(ref["fwd/weak/t_embed"] + ref["fwd/weak/y_embed"])
    h = jnp.asarray(ref["fwd/weak/s_embed"] + positions(ONE, 0, size, own.width)[None])

    @jax.jit
    def run(leaves, h, c):
        made = nnx.merge(graph, leaves).given(None, (size, size))
        none = jnp.zeros((1, own.width))
        out, branches, _ = made.outputs(h, jax.nn.silu(jax.nn.silu(c)))
        return made.modulated(0, h, none, none), *branches, out

    names = ("block0.norm1", "block0.attn", "block0.mlp", "block0")
    for name, ours in zip(names, run(leaves, h, embedded)):
        yield from close(ref, f"fwd/weak/{name}", ours, FORWARD)
    w = np.repeat(angles((size, size), (size, size), own.head_width), 2, axis=-1)
    yield from close(ref, "fwd/weak/rope_cos", np.cos(w), 1e-6)
    yield from close(ref, "fwd/weak/rope_sin", np.sin(w), 1e-6)


class Model:
    """One of the file, read as a file of weights is."""

    def __init__(self, ref: Reference, case: str):
        self.ref, self.case, self.state = ref, case, ref.below(case)
        settings = ref.config[case]
        norm = "layer" if settings["use_qknorm"] and not settings["use_rmsnorm"] else "rms"
        mixer = f"rope:qk_norm={norm if settings['use_qknorm'] else 'none'}"
        (_, depth), (_, width), (_, heads) = (
            settings[name] for name in ("depth", "hidden_size", "num_heads")
        )
        network = f"ddt:width={width},depth={depth},heads={heads}"
        network += f",rms={str(settings['use_rmsnorm']).lower()}"
        self.config = find_config(self.state, "sit", network=network)
        assert str(self.config.block.mixer) == mixer
        if width != self.config.width:  # then the file says it all
            assert find_config(self.state, "sit") == self.config
        self.params = jax.tree.map(jnp.asarray, from_torch(self.config, self.state))
        self.apply = make_apply(self.config)

    def __call__(self, x: Any, t: Any, y: Any) -> jax.Array:
        """Theirs, with arrays as ours."""
        return -self.apply(self.params, x, 1 - t, y, 0)

    def file(self) -> Iterator[Row]:
        """Counts, tables, and back to the names of the original."""
        ref, case, config = self.ref, self.case, self.config
        leaves = jax.tree.leaves(self.params)
        positions = config.latent_size**2 * config.width
        yield from close(ref, f"{case}_parameters", sum(x.size for x in leaves) + positions, 0)
        grid = (config.latent_size, config.latent_size)
        w = np.repeat(angles(grid, grid, config.head_width), 2, axis=-1)
        yield from close(ref, f"fwd/{case}/rope_cos", np.cos(w), 1e-6)
        yield from close(ref, f"fwd/{case}/rope_sin", np.sin(w), 1e-6)
        for name, ours in to_torch(config, self.params).items():
            yield from close(ref, f"{case}/{name}", ours, 0)

    def forward(self) -> Iterator[Row]:
        ref, name = self.ref, f"fwd/{self.case}"
        x, t, y = nhwc(ref["fwd/x"]), jnp.asarray(ref["fwd/t"]), jnp.asarray(ref["fwd/y"])
        y = y.astype(jnp.int32)
        out = jax.jit(self)(x, t, y)
        yield from close(ref, f"{name}/out", nchw(out), FORWARD)
        for what, ours in self.inside(x, 1 - t, y, ref["fwd/s_given"]).items():
            if what == "out_s_given":  # of tokens that the encoder of `main` gives
                if ref["fwd/s_given"].shape[-1] != self.config.width or self.case != "main":
                    continue
                ours = nchw(-ours)
            yield from close(ref, f"{name}/{what}", ours, FORWARD)

    def inside(self, x: Any, t: Any, y: Any, given: np.ndarray) -> dict[str, jax.Array]:
        """Parts of the network by the names of the file."""
        make = lambda: self.config.network.module(
            self.config, dtype=jnp.float32, remat="none", rngs=nnx.Rngs(0)
        )
        graph, _ = nnx.split(nnx.eval_shape(make))

        def run(params, x, t, y):
            network: WideHead = nnx.merge(graph, params)
            found = {"t_embed": network.time(t), "y_embed": network.label(y)}
            told = (split((), y),)
            times, (c,) = network.embedded((t,), told, (0,))
            h = network.tokens(x, 0, *told)
            place = positions(self.config.pyramid, 0, self.config.latent_size, h.shape[-1])
            found["s_embed"] = h - jnp.asarray(place)[None]
            grid, c = network.grid(0), jax.nn.silu(c)
            for i in range(self.config.depth):
                block = jax.tree.map(lambda p, i=i: p[i], network.blocks).given(None, grid)
                if i == 0:
                    ones = jnp.ones((1, h.shape[-1]))
                    found["block0.norm1"] = block.modulated(0, h, 0 * ones, 0 * ones)
                h, (attention, mlp), _ = block.outputs(h, c)
                found[f"block{i}"] = h
                if i == 0:
                    found |= {"block0.attn": attention, "block0.mlp": mlp}
            found["s_after_silu"] = jax.nn.silu(times[0][:, None] + h)
            s = project(network, found["s_after_silu"])
            if network.wider:
                found["s_projected"] = s
            own = found["x_embed"] = network.own(x, 0)
            heads, tokens, _ = head(network, own, network.told(h, times[0]))
            found |= {f"block{self.config.depth + i}": h for i, h in enumerate(heads)}
            found["final_tokens"] = -tokens
            if given.shape[-1] == self.config.width:
                each = h.shape[1] // given.shape[1]  # tokens in a row, as the original has it
                s = project(network, jnp.repeat(jnp.asarray(given), each, axis=1))
                found["out_s_given"] = head(network, own, jax.nn.silu(s))[2]
            return found

        return jax.jit(run)(self.params, x, t, y)


def project(network: WideHead, s: Any) -> jax.Array:
    return network.project(s) if network.wider else s


def head(network: WideHead, h: Any, c: Any) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """The head's tokens after every block, its final tokens, and its prediction."""
    found, settings = [], network.config.network
    for i in range(settings.depth):
        block = jax.tree.map(lambda p, i=i: p[i], network.head_blocks).given(None, network.grid(0))
        h = block.outputs(h, c)[0]
        found.append(h)
    out = network.outputs(h, c, 0)
    return found, out.reshape(*h.shape[:2], -1), out


def training(ref: Reference, model: Model) -> Iterator[Row]:
    """One batch at times that their law draws, and gradients by name."""
    shift, config = ref.config["shift"], model.config
    u, low = jnp.asarray(ref["train/uniform"]), float(shifted(1 - LAST, shift))
    law = Law(shift, LogitNormal())
    t = law.times(u, np.full(len(u), low), np.ones(len(u)))
    yield from close(ref, "train/t", 1 - t, 2e-6)
    t = 1 - jnp.asarray(ref["train/t"])
    draws = Draws(nhwc(ref["train/x0"]), t, jnp.asarray(ref["train/y"], jnp.int32))
    objective = FlowObjective(ONE, Flow(shift=shift), config.null_label)
    batch = {"x": nhwc(ref["train/x1"])}

    def value(params):
        (view,), (out,) = objective.predicted(model.apply, params, {}, batch, draws)
        errors = objective.errors(view, out)
        return jnp.mean(errors), {
            "x_t": nchw(view.xt), "pred": nchw(-out.prediction), "loss": errors,
        }  # fmt: skip

    (_, found), grads = jax.jit(jax.value_and_grad(value, has_aux=True))(model.params)
    for name, ours in found.items():
        yield from close(ref, f"train/{name}", ours, FORWARD)
    tensors = to_torch(config, grads)
    assert not np.any(tensors.pop("t_embedder.W"))
    yield from gradient_rows(ref, "train/grad", tensors, FORWARD)


def guidance(ref: Reference, main: Model, weak: Model) -> Iterator[Row]:
    x, y = nhwc(ref["fwd/x"]), jnp.asarray(ref["sample/y"], jnp.int32)
    t, settings = jnp.asarray(ref["fwd/t"]), ref.config
    for suffix, name in (("", "interval"), ("2", "interval2")):
        low, high = settings[name]
        inside = ((t >= low) & (t <= high))[:, None, None, None]
        for kind in ("autoguidance", "cfg"):
            guide, scale = of_kind(kind, main, settings)
            both = jax.jit(lambda x, t, y, g=guide, s=scale: g(main, weak, x, t, y, s))(x, t, y)
            ours = jnp.where(inside, both, jax.jit(main)(x, t, y))
            yield from close(ref, f"guidance/{kind}{suffix}", nchw(ours), FORWARD)


def of_kind(kind: str, main: Model, settings: dict[str, Any]) -> tuple[Any, float]:
    if kind == "cfg":
        return Cfg(main.config.null_label), settings["cfg"]
    return Auto(), settings["ag"]


def sampled(ref: Reference, kind: str, main: Model, weak: Model) -> Iterator[Row]:
    """Their grid, which ends before data; guided where they guide: by noise time."""
    settings, name = ref.config, f"sample/{kind}"
    if name not in ref:
        return
    low, high = settings["interval2" if kind == "cfg" else "interval"]
    guide, scale = of_kind(kind, main, settings)
    z, y = nhwc(ref["sample/z"]), jnp.asarray(ref["sample/y"], jnp.int32)
    raw = np.linspace(0, LAST, settings["K"])
    times = 1 - np.float32(shifted(raw, settings["shift"]))
    yield from close(ref, "sample/t", times, 2e-6)
    theirs = ref["sample/t"]
    guided = [kind != "plain" and bool(low <= t <= high) for t in theirs[:-1]]

    @functools.partial(jax.jit, static_argnums=3)
    def step(x, t, end, guided):
        ts = jnp.full(len(x), t)
        v = guide(main, weak, x, ts, y, scale) if guided else main(x, ts, y)
        return x + (end - t) * v

    x, states = z, [z]
    for t, end, on in zip(theirs, theirs[1:], guided):
        x = step(x, t, end, on)
        states.append(x)
    yield from close(ref, name, np.stack([nchw(x) for x in states]), SAMPLED)
    segments = tuple(
        Segment("ode", (0,), (scale if on else 1.0,), (1 - float(t), 1 - float(end)))
        for t, end, on in zip(theirs, theirs[1:], guided)
    )
    config = SamplerConfig("euler", len(segments), cfg=(scale,))
    by = weak.apply if kind == "autoguidance" else None
    sampler = Sampler(main.apply, main.config, Flow(), config, segments=segments, weak=by)
    last = sampler(main.params, z, y, weak=weak.params if by else None)
    error = float(np.max(np.abs(nchw(last) - ref[name][-1])))
    largest = max(1.0, float(np.max(np.abs(ref[name][-1]))))
    yield Row(f"{ref.name} {name}, last, of the sampler", error, SAMPLED * largest)
