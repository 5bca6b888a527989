"""HarmoniCa against arrays of the authors' code (ModelTC/HarmoniCa)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ppflow_jax.convert.infer import find_config
from ppflow_jax.convert.load import from_torch
from ppflow_jax.flow.method import Evaluation
from ppflow_jax.models.conditions import split
from ppflow_jax.models.layers import FREQUENCIES, Block
from ppflow_jax.models.network import PPFlow
from ppflow_jax.systems.harmonica import Mixed, learned, router_of, step_weights
from ppflow_jax.systems.routed import Routed
from tests.acceptance.comparison import Row
from tests.systems.parity_moe import nchw, nhwc

if TYPE_CHECKING:
    from tests.systems_parity import Reference

GUIDED = 3  # channels, of the noise that is predicted
STALE = 1 / (1 + np.exp(-5.0))  # their score of the first step


def rows(ref: Reference) -> Iterator[Row]:
    model = Ddpm(ref)
    if "train/x0" in ref:
        yield from training(ref, model)
    if "infer/x0" in ref:
        yield from sampling(ref, model)


def relative(ref: Reference, name: str, ours: np.ndarray, bound: float) -> Iterator[Row]:
    """The largest error of numbers of any size, each beside the largest of its epoch and step."""
    if name not in ref:
        return
    theirs, ours = np.float64(ref[name]), np.asarray(ours, np.float64)
    assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
    axes = tuple(range(2, theirs.ndim))
    size = np.maximum(np.max(np.abs(theirs), axis=axes, keepdims=True), 1e-300)
    yield Row(f"{ref.name} {name}, relative", float(np.max(np.abs(ours - theirs) / size)), bound)


def plain(blocks: Block, h: jax.Array, c: jax.Array) -> tuple[jax.Array, None]:
    """The trunk without a method."""
    return jax.lax.scan(lambda h, block: (block(h, c), None), h, blocks)[0], None


class Ddpm:
    """Their DiT, guided, and the steps of DDIM. Rows of a batch: with labels, then the null class.

    The last step of the arrays is the first of the trajectory. Sinusoids are in float64, as in the
    arrays: their times go up to 999, where float32 is 1e-4 off.
    """

    def __init__(self, ref: Reference):
        state = ref.below("model")
        self.args, self.threshold = ref.config, ref.config["thres"]
        self.config = find_config(state, "sit", heads=ref.config["heads"])
        self.params = jax.tree.map(jnp.asarray, from_torch(self.config, state))
        make = lambda: PPFlow(self.config, dtype=jnp.float32, remat="none", rngs=nnx.Rngs(0))
        self.graph, _ = nnx.split(nnx.eval_shape(make))
        times = np.float64(ref["timestep_map"])
        angles = times[:, None] * np.exp(-np.log(1e4) * np.arange(FREQUENCIES) / FREQUENCIES)
        self.features = jnp.float32(np.concatenate([np.cos(angles), np.sin(angles)], axis=-1))
        self.signal = np.float64([ref["alphas_cumprod"], ref["alphas_cumprod_prev"]])
        self.steps = len(times)
        self.order = range(self.steps - 1, -1, -1)
        self.plain = jax.jit(partial(self._output, None))
        self.mixed = jax.jit(lambda *given: self._output(Mixed(self.threshold), *given))
        self.learned = jax.jit(self._learned)

    def memory(self, rows: int):
        """Empty: never seen where scores are 1."""
        side = self.config.latent_size // 2
        shape = (self.config.depth, rows, side * side, self.config.width)
        return (jnp.full(shape, jnp.finfo(jnp.float32).max),) * 2

    def _output(self, method, x, i, y, memory=None, inputs=None):
        """(guided output with the channels of variance, memory)."""
        net: PPFlow = nnx.merge(self.graph, self.params)
        hidden = jax.nn.silu(self.features[i] @ net.time.fc1.kernel[...] + net.time.fc1.bias[...])
        c = jax.nn.silu(net.time.fc2(hidden)[None] + net.label(y))

        def call(trunk=plain):
            both = jnp.concatenate([x[: len(x) // 2]] * 2)  # they see the first half alone
            h, memory = trunk(net.blocks, net.tokens(both, 0, split((), y)), c)
            side = self.config.latent_size // 2
            out = net.final(h, c, 0).reshape(len(x), side, side, 2, 2, -1)
            out = out.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), 2 * side, 2 * side, -1)
            with_label, without = jnp.split(out[..., :GUIDED], 2)
            guided = without + self.args["cfg"] * (with_label - without)
            return jnp.concatenate([jnp.concatenate([guided] * 2), out[..., GUIDED:]], -1), memory

        if method is None:
            return call()
        return method.evaluate(Evaluation(call, inputs, False), memory)

    def _learned(self, router, x, i, y, memory, weight):
        teacher, _ = self._output(None, x, i, y)

        def student(scores):
            return self._output(Mixed(self.threshold), x, i, y, memory, {"scores": scores})

        args = self.args
        return teacher, learned(router, i, student, teacher, weight, args["l1"], args["lr"])

    def ddim(self, x: jax.Array, output: jax.Array, i: int) -> jax.Array:
        now, before = self.signal[:, i]
        noise = np.float64(output[..., : x.shape[-1]])
        clean = (np.float64(x) - np.sqrt(1 - now) * noise) / np.sqrt(now)
        return jnp.float32(np.sqrt(before) * clean + np.sqrt(1 - before) * noise)

    def step(self, y, i, x, memory, scores):
        """For `step_weights`."""
        if scores is None:
            return self.ddim(x, self.plain(x, i, y)[0], i), None
        memory = self.memory(len(x)) if memory is None else memory
        output, memory = self.mixed(x, i, y, memory, {"scores": scores})
        return self.ddim(x, output, i), memory


def training(ref: Reference, model: Ddpm) -> Iterator[Row]:
    """All epochs.

    In an epoch that renews the weights, theirs has the last rollout's branches in memory, of which
    the first step takes a little. Ours begins with an empty memory (`test_a_rollout_begins_anew`);
    here it is given theirs, so that what follows can be compared.
    """
    logits = ref["train/router_init"].reshape(model.steps, -1, 2)
    router = router_of(jnp.float32(logits), model.args["lr"])
    first, found = model.steps - 1, {}
    add = lambda name, value: found.setdefault(name, []).append(np.asarray(value))
    ones = jnp.ones_like(router.logits[0])
    for epoch in range(model.args["epochs"]):
        x, y = nhwc(ref["train/x0"][epoch]), jnp.asarray(ref["train/y"][epoch])
        stale, scores = model.memory(len(x)), ones
        if epoch * model.steps % model.args["lambda_c"] == 0:
            scores = jax.nn.sigmoid(router.logits)
            step = partial(model.step, y)
            weights, stale = step_weights(step, model.order, (first,), x, scores)
            add("lambda", [weights[i] for i in range(first)])
            scores = STALE * ones
        output, memory = model.mixed(x, first, y, stale, {"scores": scores})
        x = model.ddim(x, output, first)
        add("first_x_out", nchw(x))
        for i in range(first - 1, -1, -1):
            add("x_in", nchw(x))
            before = router
            teacher, now = model.learned(router, x, i, y, memory, jnp.float32(weights[i]))
            router, memory = now.router, now.memory
            x = model.ddim(x, now.output, i)
            scores = jax.nn.sigmoid(before.logits[i])
            gradient = (model.args["l1"] - now.worth) * scores * (1 - scores)
            for name, value in {
                "teacher": nchw(teacher),
                "student": nchw(now.output),
                "data_loss": now.error,
                "l1": scores.sum(),
                "loss": now.loss,
                "grad": gradient.ravel(),
                "probs_after": router.logits.reshape(model.steps, -1),
                "x_out": nchw(x),
            }.items():
                add(name, value)
    found = {name: np.stack(values) for name, values in found.items()}
    # Root mean squares of differences of states, to within the rounding of these
    roots, size = np.sqrt(found.pop("lambda")), np.max(np.abs(found["x_out"]))
    error = np.max(np.abs(roots - np.sqrt(ref["train/lambda"])))
    yield Row(f"{ref.name} train/lambda, roots", float(error), float(1e-8 * size))
    yield from ref.row("train/first_x_out", found.pop("first_x_out"))
    for name, ours in found.items():
        ours = ours.reshape(model.args["epochs"], first, *ours.shape[1:])
        if name in ("data_loss", "loss", "grad"):
            yield from relative(ref, f"train/{name}", ours, 1e-3 if name == "grad" else 2e-4)
        else:
            yield from ref.row(f"train/{name}", ours)


def sampling(ref: Reference, model: Ddpm) -> Iterator[Row]:
    """By the masks of the trained router, as one of our plans has them."""
    y, masks = jnp.asarray(ref["infer/y"]), ref["infer/mask"]
    if "train/probs_after" in ref:
        logits = np.float64(ref["train/probs_after"][-1, -1])
        ours = 1 / (1 + np.exp(-logits)) > model.args["infer_thres"]
        ours[-1] = True  # nothing is kept yet
        yield from ref.row("infer/mask", ours)
    steps = [tuple((bool(a), bool(m)) for a, m in mask.reshape(-1, 2)) for mask in masks]
    patterns = tuple(dict.fromkeys(steps))
    routed = jax.jit(partial(model._output, Routed(patterns)))
    mixed, plain = nhwc(ref["infer/x0"]), nhwc(ref["infer/x0"])
    memory = model.memory(len(mixed))
    way, ways, outputs = [nchw(mixed)], [nchw(plain)], []
    for i in model.order:
        number = {"pattern": jnp.int32(patterns.index(steps[i]))}
        output, memory = routed(mixed, i, y, memory, number)
        mixed = model.ddim(mixed, output, i)
        plain = model.ddim(plain, model.plain(plain, i, y)[0], i)
        for kept, value in ((way, mixed), (ways, plain), (outputs, output)):
            kept.append(nchw(value))
    yield from ref.row("infer/traj", np.stack(way))
    yield from ref.row("infer/model_out", np.stack(outputs))
    yield from ref.row("infer/plain_traj", np.stack(ways))
