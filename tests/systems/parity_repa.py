"""REPA against arrays of the authors' code (sihyun-yu/REPA).

Their time runs from data (0) to noise (1), and the network sees it: t is 1 - t of ours, and the
velocity is minus ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.convert.keys import to_torch
from ppflow_jax.flow.path import Flow, interpolate, score_from
from ppflow_jax.flow.plan import SamplerConfig, Segment, plan
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.flow.terms import View
from ppflow_jax.models.stack import Taps
from ppflow_jax.pyramid import SIT
from ppflow_jax.systems.repa import Repa, project
from tests.acceptance.comparison import Row
from tests.systems.sit_reference import (
    Sit,
    close,
    gradient_rows,
    nchw,
    nhwc,
    projector,
    projector_tensors,
)

if TYPE_CHECKING:
    from tests.systems_parity import Reference

FORWARD, SAMPLED = 1e-5, 2e-5  # of the README, relative
PATHS = {"linear": "linear", "cosine": "gvp"}


def rows(ref: Reference) -> Iterator[Row]:
    if "score/x" in ref:
        yield from scores(ref)
    if "model/x_embedder.proj.weight" in ref:
        yield from Model(ref).rows()


def scores(ref: Reference) -> Iterator[Row]:
    """From the velocity, on both paths."""
    x, v = nhwc(ref["score/x"]), nhwc(ref["score/v"])
    t = 1 - jnp.asarray(ref["score/t"])
    for theirs, ours in PATHS.items():
        score = score_from(Flow(ours), -v, x, t)
        yield from close(ref, f"score/{theirs}", nchw(score), FORWARD)


class Model:
    def __init__(self, ref: Reference):
        self.ref, settings = ref, ref.config
        self.sit = Sit(ref, settings["num_heads"], ("projectors.",))
        dims = tuple(settings["z_dims"])
        fields = tuple(f"teacher{i}" for i in range(len(dims)))
        self.term = Repa(settings["encoder_depth"], dims, settings["projector_dim"], fields)
        self.own = {f: projector(self.sit.others, f"projectors.{i}") for i, f in enumerate(fields)}
        self.coeff = settings["coeff"]

    def rows(self) -> Iterator[Row]:
        if "fwd/x" in self.ref:
            yield from self.forward()
        for name in [n for n in self.ref.arrays if n.startswith("loss/") and n.endswith("/x_t")]:
            yield from self.loss(name.split("/")[1])
        for name in [n for n in self.ref.arrays if n.startswith("sample/") and "final" in n]:
            yield from self.sample(name.split("/")[1])

    def forward(self) -> Iterator[Row]:
        ref, sit, depth = self.ref, self.sit, self.sit.config.depth
        x, t, y = nhwc(ref["fwd/x"]), jnp.asarray(ref["fwd/t"]), jnp.asarray(ref["fwd/y"])
        y = y.astype(jnp.int32)
        found = sit.parts(x, t, y)
        out = found.pop("out")
        yield from close(ref, "fwd/out", nchw(out), FORWARD)
        for name, ours in found.items():
            yield from close(ref, f"fwd/{name}", ours, FORWARD)
        taps = sit(sit.params, x, t, y, Taps(h=tuple(range(1, depth + 1)))).taps
        for i in range(depth):
            yield from close(ref, f"fwd/block{i}", taps[f"h/{i + 1}"], FORWARD)
        for i, field in enumerate(self.term.fields):
            ours = project(self.own[field], taps[f"h/{self.term.layer}"])
            yield from close(ref, f"fwd/projected{i}", ours, FORWARD)

    def loss(self, case: str) -> Iterator[Row]:
        """One path and way to draw times, of which the times are given."""
        ref, name, term = self.ref, f"loss/{case}", self.term
        flow = Flow(PATHS[case.split("_")[0]])
        x1, noise = nhwc(ref["loss/images"]), nhwc(ref["loss/noise"])
        y, t = jnp.asarray(ref["loss/y"], jnp.int32), jnp.asarray(ref[f"{name}/t"])
        xt, velocity = interpolate(flow.interpolant, noise, x1, 1 - t)
        yield from close(ref, f"{name}/x_t", nchw(xt), FORWARD)
        grid = self.sit.config.pyramid.grid(0, self.sit.config.latent_size)
        batch = {f: grid_of(ref[f"loss/{f}"], grid) for f in term.fields}

        def losses(params, own, shift):
            out = self.sit(params, xt, t, y, term.taps)
            taps = {k: h + shift for k, h in out.taps.items()}
            view = View(x1, noise, xt, t, y, velocity, batch, {}, 0, grid)
            denoising = jnp.mean(jnp.square(out.prediction + velocity), axis=(1, 2, 3))
            projection = jnp.mean(term(own, out._replace(taps=taps), view))
            return jnp.mean(denoising) + self.coeff * projection, (denoising, projection)

        h = jnp.zeros((len(xt), np.prod(grid), self.sit.config.width))
        given = (self.sit.params, self.own, h)
        total, (denoising, projection) = jax.jit(losses)(*given)
        yield from close(ref, f"{name}/denoising", denoising, FORWARD)
        yield from close(ref, f"{name}/projection", projection, FORWARD)
        yield from close(ref, f"{name}/total", total, FORWARD)
        if not ref.below(f"{name}/dproj"):
            return
        params, own = jax.jit(jax.grad(lambda *args: losses(*args)[0], (0, 1)))(*given)
        yield from self.gradients(f"{name}/dtotal", params, own)
        alone = jax.jit(jax.grad(lambda *args: losses(*args)[1][1], (1, 2)))
        own, features = alone(*given)
        yield from close(ref, f"{name}/dproj_dfeature", features, FORWARD, 1e-4)
        yield from self.gradients(f"{name}/dproj", None, own)

    def gradients(self, prefix: str, params, own) -> Iterator[Row]:
        tensors = {} if params is None else to_torch(self.sit.config, params)
        for i, field in enumerate(self.term.fields):
            tensors |= projector_tensors(own[field], f"projectors.{i}")
        yield from gradient_rows(self.ref, prefix, tensors, FORWARD)
        table = "y_embedder.embedding_table.weight"
        if table in tensors:
            used = {table: tensors[table][self.ref["loss/y"]]}
            yield from gradient_rows(self.ref, f"{prefix}_rows", used, FORWARD)

    def sample(self, case: str) -> Iterator[Row]:
        """Their grids, guided where theirs are; the noise of stochastic steps is given."""
        ref, settings = self.ref, self.ref.config
        scale = settings["cfg"] if case.endswith("_cfg") else 1.0
        solver, points = ("sde-euler", 0) if case.startswith("sde") else ("euler", 1)
        config = SamplerConfig(
            "heun" if "heun" in case else solver,
            settings["nsteps"] + points,
            "reference",
            (scale,),
            cfg_interval=(1 - settings["hi"], 1 - settings["lo"]),
        )
        replay = nhwc(ref["sample/sde_eps"]) if solver == "sde-euler" else None
        x, y = nhwc(ref["sample/latents"]), jnp.asarray(ref["sample/y"], jnp.int32)

        def velocity(params, x, t, y, stage):
            return -self.sit.apply(params, x, 1 - t, y, stage)

        runs = runs_of(config)
        for used, segments in runs:
            sampler = Sampler(velocity, self.sit.config, Flow(), used, segments=segments)
            x = sampler(self.sit.params, x, y, replay=replay)
        yield from close(ref, f"sample/{case}/final", nchw(x), SAMPLED)
        guided = [s.guided for _, part in runs for s in part for _ in range(s.steps)]
        yield from close(ref, f"sample/{case}/guided", np.concatenate(guided), 0)


def runs_of(config: SamplerConfig) -> list[tuple[SamplerConfig, tuple[Segment, ...]]]:
    """Their Heun takes its last step without the corrector."""
    segments = plan(config, SIT, Flow())
    if config.solver != "heun":
        return [(config, segments)]
    *others, last = segments
    first = replace(last, times=last.times[:-1])
    end = replace(last, stages=last.stages[:1], scales=last.scales[:1], times=last.times[-2:])
    heun = (*others, *([first] if first.steps else []))
    return [(config, heun), (replace(config, solver="euler"), (end,))]


def grid_of(tokens: np.ndarray, grid: tuple[int, int]) -> jax.Array:
    return jnp.asarray(tokens).reshape(len(tokens), *grid, -1)
