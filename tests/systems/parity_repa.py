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
from ppflow_jax.flow.loss import Draws, FlowObjective
from ppflow_jax.flow.path import Flow, score_from
from ppflow_jax.flow.plan import SamplerConfig, Segment, plan
from ppflow_jax.flow.sampler import Sampler
from ppflow_jax.flow.terms import OWN, View, network_leaves
from ppflow_jax.models.network import Output
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
        taps = sit(sit.params, x, t, y, Taps(h=tuple(range(1, depth + 1)))).taps
        found = sit.parts(x, t, y, taps[f"h/{depth}"])
        out = found.pop("out")
        yield from close(ref, "fwd/out", nchw(out), FORWARD)
        for name, ours in found.items():
            yield from close(ref, f"fwd/{name}", ours, FORWARD)
        for i in range(depth):
            yield from close(ref, f"fwd/block{i}", taps[f"h/{i + 1}"], FORWARD)
        for i, field in enumerate(self.term.fields):
            ours = project(self.own[field], taps[f"h/{self.term.layer}"])
            yield from close(ref, f"fwd/projected{i}", ours, FORWARD)

    def loss(self, case: str) -> Iterator[Row]:
        """One path and way to draw times, of which the times are given."""
        ref, name, term = self.ref, f"loss/{case}", self.term
        y, t = jnp.asarray(ref["loss/y"], jnp.int32), jnp.asarray(ref[f"{name}/t"])
        draws = Draws(nhwc(ref["loss/noise"]), 1 - t, y)
        grid = self.sit.config.pyramid.grid(0, self.sit.config.latent_size)
        batch = {f: grid_of(ref[f"loss/{f}"], grid) for f in term.fields}
        batch["x"] = nhwc(ref["loss/images"])
        flow = Flow(PATHS[case.split("_")[0]])
        objective = FlowObjective(SIT, flow, self.sit.config.null_label, terms=(term,))
        params = self.sit.params | {OWN: {term.name: self.own}}

        def value(params):
            given = (self.apply, params, {}, batch, draws)
            (view,), (out,) = objective.predicted(*given, term.taps)
            total, metrics = objective.loss(*given, {term.name: self.coeff})
            found = {"x_t": nchw(view.xt), "denoising": objective.errors(view, out)}
            return total, (found | {"projection": metrics[term.name]}, out.taps)

        graded = bool(ref.below(f"{name}/dproj"))
        run = jax.jit(jax.value_and_grad(value, has_aux=True) if graded else value)
        result, grads = run(params) if graded else (run(params), None)
        total, (found, taps) = result
        for what, ours in {"total": total, **found}.items():
            yield from close(ref, f"{name}/{what}", ours, FORWARD)
        if not graded:
            return
        yield from self.gradients(f"{name}/dtotal", grads, grads[OWN][term.name])
        view = View(*[None] * 6, batch, {}, 0, grid)
        projection = lambda own, taps: jnp.mean(term(own, Output(None, {}, taps), view))
        own, features = jax.jit(jax.grad(projection, (0, 1)))(self.own, taps)
        yield from close(ref, f"{name}/dproj_dfeature", features[f"h/{term.layer}"], FORWARD, 1e-4)
        yield from self.gradients(f"{name}/dproj", None, own)

    def apply(self, params, xs, ts, ys, stages, taps) -> tuple[Output, ...]:
        """Theirs as one of ours: t is 1 - t, and the velocity changes its sign."""
        outputs = self.sit.apply(params, xs, tuple(1 - t for t in ts), ys, stages, taps=taps)
        return tuple(out._replace(prediction=-out.prediction) for out in outputs)

    def gradients(self, prefix: str, params, own) -> Iterator[Row]:
        tensors = {} if params is None else to_torch(self.sit.config, network_leaves(params))
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
