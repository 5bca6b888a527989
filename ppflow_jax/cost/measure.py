"""What `bench` measures: one row is one program with its FLOPs, times, memory and compile times."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax import console
from ppflow_jax.checkpoints.card import Card
from ppflow_jax.devices.programs import for_passes, for_training
from ppflow_jax.flow.cost import sampling_flops, training_flops
from ppflow_jax.flow.loss import FlowObjective
from ppflow_jax.flow.path import Flow
from ppflow_jax.flow.plan import SamplerConfig, evaluations
from ppflow_jax.generate.plan import make_plan
from ppflow_jax.models.config import ModelConfig
from ppflow_jax.models.network import Apply, abstract_params, make_apply
from ppflow_jax.train.optimizer import OptimConfig, make_optimizer
from ppflow_jax.train.state import state_from
from ppflow_jax.train.step import compiled, make_train_step


class Settings(NamedTuple):
    """As in the configuration of a run."""

    dtype: jnp.dtype
    attention: str
    remat: str


class Ceiling:
    """What the device reaches in plain square matrix products of one dtype, one after another.

    `side` and `count` of them are what fills the device, if not given.
    """

    def __init__(self, dtype: jnp.dtype, side: int = 0, count: int = 0):
        suits = (2048, 2) if jax.default_backend() == "cpu" else (8192, 16)
        self.side, self.count = side or suits[0], count or suits[1]
        self.seconds: list[float] = []
        a = jax.random.normal(jax.random.key(0), (self.side, self.side)).astype(dtype)
        a = a / self.side**0.5

        @jax.jit
        def products(a):
            return jax.lax.fori_loop(0, self.count, lambda _, b: (a @ b).astype(dtype), a)

        self.call = lambda: products(a).block_until_ready()
        self.call()

    def time(self) -> None:
        self.seconds.append(_seconds(self.call))

    @property
    def rate(self) -> float:
        """FLOP/s, the median over the rounds."""
        return 2 * self.side**3 * self.count / statistics.median(self.seconds)


@dataclass
class Row:
    """One program.

    Attributes:
      flops, xla_flops: of one call, by formula and as XLA counts.
      images: of one call.
      nfe: evaluations of the network for an image, a guided one counted once; training: 1.
      memory: bytes of arguments, results and temporaries, as the compiler counts.
      compile_cold, compile_cached: seconds of tracing and compiling, without anything cached, and
        with a persistent cache that has the program.
      seconds: of every timed call.
    """

    name: str
    size: str
    detail: str
    call: Callable[[], Any]
    flops: int
    xla_flops: float
    images: int
    nfe: int
    memory: int
    compile_cold: float
    compile_cached: float
    seconds: list[float] = field(default_factory=list)

    def time(self) -> None:
        self.seconds.append(_seconds(self.call))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def xla_forward_flops(model: ModelConfig, apply: Apply, stage: int, *, gradient: bool) -> float:
    """FLOPs that XLA counts in a forward pass of one image, or in its gradient.

    XLA counts the body of a loop once, so blocks are counted as one less none, times their
    number.
    """

    def count(blocks: int) -> float:
        def trunk(stacked, h, c):
            return stacked_block(stacked)(h, c) if blocks else h, None

        def run(params, x, t, y):
            return jnp.sum(apply(params, x, t, y, stage, trunk=trunk)[0])

        x = jax.ShapeDtypeStruct((1, *model.shape), jnp.float32)
        t, y = (jax.ShapeDtypeStruct((1,), d) for d in (jnp.float32, jnp.int32))
        work = jax.grad(run) if gradient else run
        lowered = jax.jit(work).lower(abstract_params(model), x, t, y)
        return lowered.cost_analysis()["flops"]

    ends = count(0)
    return ends + model.blocks_at(stage) * (count(1) - ends)


def stacked_block(stacked: Any) -> Any:
    """The first of a stack of blocks."""
    return jax.tree.map(lambda leaf: leaf[0], stacked)


def _compiled(lower: Callable[[], list[Any]]) -> tuple[int, float, float]:
    """Memory and both compile times of programs that run one after another.

    The persistent cache must be on, and not have them.
    """
    times, programs = [], []
    for _ in range(2):
        jax.clear_caches()
        start = time.perf_counter()
        programs = [lowered.compile() for lowered in lower()]
        times.append(time.perf_counter() - start)
    sizes = [p.memory_analysis() for p in programs]
    memory = max(
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        + m.temp_size_in_bytes
        for m in sizes
    )
    return memory, *times


@functools.cache
def _leaf(name: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    values = np.random.default_rng(0).standard_normal(shape, np.float32)  # compiles nothing
    return jnp.asarray(0.02 * values, dtype)


@functools.cache
def _params(model: ModelConfig) -> Any:
    """Random parameters. Models of one size share what has the same shape: one trunk for all."""
    return jax.tree.map_with_path(
        lambda path, leaf: _leaf(jax.tree_util.keystr(path), leaf.shape, leaf.dtype),
        abstract_params(model),
    )


def sampling_row(
    name: str,
    size: str,
    model: ModelConfig,
    config: SamplerConfig,
    batch: int,
    settings: Settings,
) -> Row:
    """Sampling of `batch` images."""
    dtype, attention, remat = settings
    programs = for_passes(attention, dtype, head=model.head_width)
    apply = make_apply(model, dtype=dtype, remat=remat, programs=programs)
    sampler = make_plan(Card(model, Flow(), "latents"), config).sampler(apply)
    x = jax.ShapeDtypeStruct((batch, *model.shape), jnp.float32)
    y = jax.ShapeDtypeStruct((batch,), jnp.int32)
    memory = _compiled(lambda: sampler.lower(abstract_params(model), x, y, None))
    counts = [
        xla_forward_flops(model, apply, stage, gradient=False)
        for stage in range(len(model.pyramid))
    ]
    xla = sum(
        s.steps * (1 + guided) * counts[stage]
        for s in sampler.segments
        for stage, guided in zip(s.stages, s.guided)
    )

    def call():
        noise = jax.random.normal(jax.random.key(1), x.shape)
        sampler(_params(model), noise, jnp.zeros(batch, jnp.int32)).block_until_ready()

    scales = ",".join(f"{s:g}" for s in config.scales(model.pyramid))
    flops = batch * sampling_flops(model, sampler.segments)
    return Row(
        name, size, scales, call, flops, batch * xla, batch, evaluations(sampler.segments), *memory
    )


def training_row(name: str, size: str, model: ModelConfig, batch: int, settings: Settings) -> Row:
    """A training step: draws, loss, gradients, AdamW and EMA."""
    dtype, attention, remat = settings
    programs = for_training(attention, dtype, remat=remat, head=model.head_width)
    apply = make_apply(model, dtype=dtype, remat=remat, programs=programs)
    tx = make_optimizer(OptimConfig(), 1)
    objective = FlowObjective(model.pyramid, Flow(), model.null_label)
    objective.check_batch(batch, 1)
    step = compiled(make_train_step(objective, apply, tx, ema=0.9999), programs)
    begin = jax.jit(lambda params: state_from(params, tx))
    key = jax.random.key(0)
    x = jax.ShapeDtypeStruct((batch, *model.shape), jnp.float32)
    y = jax.ShapeDtypeStruct((batch,), jnp.int32)
    inputs = {"x": x, "label": y}
    abstract = jax.eval_shape(begin, abstract_params(model))
    memory = _compiled(lambda: [step.lower(abstract, inputs, key)])
    counts = [
        xla_forward_flops(model, apply, stage, gradient=True) for stage in range(len(model.pyramid))
    ]
    xla = sum(counts[stage] for stage in objective.pattern) / len(objective.pattern)
    state: Any = None
    data = {"x": jnp.zeros(x.shape), "label": jnp.zeros(batch, jnp.int32)}

    def call():
        nonlocal state
        state = begin(_params(model)) if state is None else state
        state, metrics = step(state, data, key)
        jax.block_until_ready((state, metrics))

    flops = training_flops(model, objective.pattern, batch)
    return Row(name, size, "", call, flops, batch * xla, batch, 1, *memory)


def row_figures(row: Row, base: Row, ceiling: float) -> dict[str, Any]:
    """Everything about a timed row; `base` is SiT's, `ceiling` in FLOP/s."""
    seconds = np.array(row.seconds)
    median = float(np.median(seconds))
    low, high = (float(q) for q in np.quantile(seconds, (0.25, 0.75)))
    # Within each round, so that a slow spell hits both.
    speedup = statistics.median(b / a for a, b in zip(row.seconds, base.seconds))
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "model": row.name,
        "size": row.size,
        "guidance": row.detail,
        "nfe": row.nfe,
        "images": row.images,
        "seconds": median,
        "quartiles": [low, high],
        "images_per_second": row.images / median,
        "seconds_per_image": median / row.images,
        "flops": row.flops,
        "xla_flops": row.xla_flops,
        "flop_share": row.flops / base.flops,
        "speedup_implied": base.flops / row.flops,
        "speedup": speedup,
        "matmul_ceiling": ceiling,
        "mfu": row.flops / median / ceiling,
        "memory_bytes": row.memory,
        "device_peak_bytes": stats.get("peak_bytes_in_use"),  # so far, of all rows; no CPU has it
        "compile_seconds": row.compile_cold,
        "cached_compile_seconds": row.compile_cached,
    }


HEAD = (
    *("model", "guidance", "NFE", "s/image", "quartiles", "images/s", "GFLOPs", "XLA", "MFU"),
    *("of SiT", "implied", "measured", "reached", "MB", "compile s", "cached"),
)


def table(figures: list[dict[str, Any]]) -> str:
    """The figures as a person reads them.

    `of SiT` is the share of FLOPs, `implied` the speed-up that it implies, `reached` how much of
    that was measured, `MFU` the rate over that of plain matrix products.
    """
    rows = [HEAD]
    for f in figures:
        n = f["images"]
        low, high = (q / n for q in f["quartiles"])
        row = [f["model"], f["guidance"], str(f["nfe"]), f"{f['seconds_per_image']:.4f}"]
        row += [f"{low:.4f}-{high:.4f}", f"{f['images_per_second']:.2f}"]
        row += [f"{f[name] / n / 1e9:.1f}" for name in ("flops", "xla_flops")]
        row += [f"{f['mfu']:.0%}", f"{f['flop_share']:.1%}"]
        row += [f"{f[name]:.2f}x" for name in ("speedup_implied", "speedup")]
        row += [f"{f['speedup'] / f['speedup_implied']:.0%}", f"{f['memory_bytes'] / 1e6:.0f}"]
        row += [f"{f[name]:.1f}" for name in ("compile_seconds", "cached_compile_seconds")]
        rows.append(row)
    return console.table(rows)
