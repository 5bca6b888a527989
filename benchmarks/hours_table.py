"""Writes docs/hours.md: how long training and sampling take on GPUs and TPU slices, by formula.

    python -m benchmarks.hours_table

Compiles nothing and measures nothing; takes seconds.
"""

from __future__ import annotations

import math
from pathlib import Path

import jax

from configs import imagenet256
from ppflow_jax.cost.chips import CHIPS, GPUS
from ppflow_jax.cost.estimate import (
    IMAGENET,
    SAMPLES,
    Times,
    Work,
    sampling_work,
    training_bytes,
    training_work,
)
from ppflow_jax.cost.published import REACHED, RUNS
from ppflow_jax.files.disk import atomic
from ppflow_jax.generate.plan import make_plan
from ppflow_jax.models.network import abstract_params
from ppflow_jax.train.experiment import Experiment

PAGE = Path(__file__).parents[1] / "docs" / "hours.md"
STEPS, BATCH = 400_000, 256
SIZES = {"b": "B", "xl": "XL"}
LEVELS = {"sit": "SiT", "2": "2 levels", "3": "3 levels"}
NAMES = {"a100": "A100", "h100": "H100", "h200": "H200", "rtx4090": "RTX 4090", "l4": "L4"}
# (chip, slice or number of GPUs, devices)
GPU_COUNTS = [(name, str(n), n) for name in NAMES for n in (1, 2, 4, 8)]
SLICES = [
    ("v5e", "2x4", 8),
    ("v5e", "4x8", 32),
    ("v5p", "2x2x2", 8),
    ("v5p", "4x4x4", 64),
    ("v6e", "2x4", 8),
    ("v6e", "4x8", 32),
    ("tpu7x", "2x2x1", 8),
    ("tpu7x", "4x4x4", 128),
]
SAMPLED = 32  # images a device at once


class Case:
    """A model of the tables."""

    def __init__(self, size: str, levels: str):
        name = f"sit_{size}" if levels == "sit" else f"ppflow_{size}{levels}"
        config = imagenet256.get_config(name)
        self.config = config
        self.experiment = Experiment.from_config(config)
        self.model = self.experiment.card.model
        leaves = jax.tree.leaves(abstract_params(self.model))
        self.parameters = sum(math.prod(leaf.shape) for leaf in leaves)
        self.pattern = self.experiment.objective.pattern
        self.segments = make_plan(self.experiment.card, self.experiment.sampler).segments

    def training(self, devices: int, batch: int = BATCH) -> Work:
        return training_work(self.model, self.pattern, self.parameters, batch, devices)

    def sampling(self, devices: int) -> Work:
        batch = SAMPLED * devices
        return sampling_work(self.model, self.segments, self.parameters, batch, devices)

    def memory(self, devices: int, remat: str) -> float:
        """Bytes on a device: state, gradients and what the gradient needs."""
        self.config.model.remat = remat
        images = {
            stage: BATCH / devices * self.pattern.count(stage) / len(self.pattern)
            for stage in set(self.pattern)
        }
        weights = 4 * self.parameters
        return 4 * weights + training_bytes(self.config, self.model, weights, images)


def times(work: Work, chip: str, shape: str, devices: int) -> Times:
    return Times.of(work.limits((CHIPS | GPUS)[chip], shape, devices), REACHED[chip])


def fits(case: Case, chip: str, devices: int) -> str:
    """The least rematerialisation with which the step fits, as `config.model.remat`."""
    for remat in ("none", "dots", "full"):
        if case.memory(devices, remat) < 0.9 * (CHIPS | GPUS)[chip].memory:
            return remat
    return "no"


def span(values: Times, scale: float) -> str:
    """The three times, in units of `scale` seconds."""
    return " / ".join(_short(v / scale) for v in values)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def table(size: str, rows: list[tuple[str, str, int]]) -> list[str]:
    cases = {levels: Case(size, levels) for levels in LEVELS}
    lines = [
        f"| {SIZES[size]} on | {' | '.join(f'{name}: images/s' for name in LEVELS.values())} | "
        + " | ".join(f"{name}: hours" for name in LEVELS.values())
        + " | remat |",
        "|---|" + "---|" * 7,
    ]
    for chip, shape, devices in rows:
        found = [times(case.training(devices), chip, shape, devices) for case in cases.values()]
        rates = [f"{_short(BATCH / t.diffusion)} to {_short(BATCH / t.limits)}" for t in found]
        hours = [span(each, 3600 / STEPS) for each in found]
        remat = fits(cases["sit"], chip, devices)
        lines.append(f"| {label(chip, shape)} | {' | '.join([*rates, *hours, remat])} |")
    return lines


def label(chip: str, shape: str) -> str:
    return f"{shape} {NAMES[chip]}" if chip in NAMES else f"{chip}:{shape}"


def samples(rows: list[tuple[str, str, int]]) -> list[str]:
    lines = [
        "| on | "
        + " | ".join(f"{SIZES[s]}, {name}" for s in SIZES for name in LEVELS.values())
        + " |",
        "|---|" + "---|" * 6,
    ]
    cases = [Case(size, levels) for size in SIZES for levels in LEVELS]
    for chip, shape, devices in rows:
        cells = []
        for case in cases:
            work = case.sampling(devices)
            cells.append(span(times(work, chip, shape, devices), 60 * work.images / SAMPLES))
        lines.append(f"| {label(chip, shape)} | {' | '.join(cells)} |")
    return lines


def runs() -> list[str]:
    case = Case("xl", "sit")
    lines = [
        "| run | measured, images/s | estimate of SiT-XL | inside | about it |",
        "|---|---|---|---|---|",
    ]
    for run in RUNS:
        found = times(case.training(run.count, run.batch), run.chip, str(run.count), run.count)
        rates = [run.batch / s for s in found]
        inside = 0.98 * rates[2] <= run.images_per_second <= rates[0]  # shares are rounded
        lines.append(
            f"| {run.name}, {run.count} GPU(s), batch {run.batch} | {run.images_per_second:,.0f} | "
            f"{' / '.join(f'{r:,.0f}' for r in rates)} | {'yes' if inside else 'no, slower'} | "
            f"{run.note} |"
        )
    return lines


def sources() -> list[str]:
    lines = ["| chip | best | diffusion transformer |", "|---|---|---|"]
    for chip, (best, diffusion) in REACHED.items():
        name = NAMES.get(chip, chip)
        shares = (f"{share.value:.1%}: {share.source}" for share in (best, diffusion))
        lines.append(f"| {name} | {' | '.join(shares)} |")
    return lines


# By hand, from python -m tests.acceptance.calibrated
CALIBRATED = """Measured, `python -m tests.acceptance.calibrated`: 200 steps of three models that
are not among the fourteen, in turn with 20 rounds of the calibration, in one process, on two cores
of an AMD EPYC with nothing else to do.

| model, batch | foretold s a step | measured (quartiles) | ratio |
|---|---|---|---|
| digits, 2 levels, width 128, 64 | 0.069 | 0.059 (0.046 to 0.060) | 1.17 |
| digits, SiT, 64 | 0.070 | 0.071 (0.062 to 0.085) | 0.98 |
| 16x16x4, 2 levels, width 192, depth 6, 16 | 0.113 | 0.102 (0.084 to 0.104) | 1.10 |

The worst error on the fourteen programs themselves was 4%. 64 digits by `config.sample`, timed
after the rounds: foretold 0.79 s, measured 0.83 s. With thirty other processes waiting for the
cores the same command gave ratios of 0.86 and 0.87 for steps and 1.59 for sampling: calibrate a
machine that is quiet.
"""

HEAD = f"""# How long on my hardware

**Every figure here is an estimate, but for those under Calibrate.**
`python -m benchmarks.hours_table` computes them in seconds. For your own run, mesh and sampler:

<!-- needs: minutes of compiling -->
```bash
ppflow train --config=ppflow_xl2 --dry_run=8xH100   # or gpu:a100:4, tpu:v5p:4x4x4
ppflow bench --calibrate                            # times small programs on this machine, once
ppflow train --config=digits --dry_run=here
```

Times are `limits / best / diffusion`:

* **limits**: what published peaks (`cost/chips.py`) allow if all transfers hide behind work.
  Nothing is faster.
* **best**: the most of the bfloat16 peak that a public training run reached on that kind of chip,
  mostly of language models. A good aim.
* **diffusion**: what public diffusion transformers reached. What to plan with.

Where HBM or links take longer than that share of the peak, they count. FLOPs are by formula
(`models/flops.py`), state is float32 and on every device, gradients are summed once a step, in
bfloat16. Reading data and writing checkpoints are not counted, nor what a host needs to start a
step. An L4 is held back by its 72 W more than by its peak: expect the slow end, or slower.
[Sources](#sources) are below; [Scaling](scaling.md) has compiled programs and other meshes.

## Calibrate

`ppflow bench --calibrate` times fourteen small programs in turn (seven training steps, seven
samplers), plain matrix products and copies, and fits what a step costs: FLOPs of dense products
and of attention, elements that pass memory, parameters that the optimizer passes, blocks, and the
step itself, by non-negative least squares of relative errors. It is kept in
`~/.cache/ppflow_jax/calibration.json` with device, version of jax and date, and refused on
another device or version. `--dry_run=here` then gives a range of what it foretells, 10% to either
side or, if that is more, the worst error on the programs that it was fitted to. It is of one
device and one `--dtype`; give that of the run. Only a CPU has tried it.

{CALIBRATED}
## Training, {STEPS:,} steps of {BATCH} images

{STEPS * BATCH / IMAGENET:.1f} epochs of ImageNet, 256x256 pixels (latents 32x32x4). images/s
are from diffusion to limits. `remat` is the least `config.model.remat` with which a step of SiT
fits by formula, recomputed FLOPs not counted; `no`: use `config.train.accumulate`, or split the
state over `config.mesh.fsdp`. A chip of TPU7x is two devices: 2x2x1 are four chips.
"""

SAMPLING = f"""## Sampling {SAMPLES:,} images, minutes

Heun, 50 intervals, guidance in every stage (the default of the configurations), {SAMPLED} images
a device at a time, weights on every device, without decoding. The same shares of the peak as in
training are assumed. Accelerated plans ([Accelerate](accelerate.md), [Tune](tune.md)) need a part
of it.
"""

AGAINST = """## Against public runs

*Inside* is from the slow end to the limits. Two of the runs set the slow end of their chip and
say nothing about the estimate; the others are slower than the range.
"""

SOURCES = """The DiT paper's XL/2 on 128 TPU v3 (5.7 steps/s of 256) is 6.6% of the peak of a
chip that is not in the tables.

## Sources
"""

END = """Nothing public was found for H200, L4 and TPU7x: H100, RTX 4090 and v6e stand in. Wan2.1 on
v5p stands in for every TPU, and GPT-2 for a slow end on RTX 4090. Chips: Google's and
NVIDIA's data sheets, see `ppflow_jax/cost/chips.py`.
"""


def document() -> str:
    parts = [HEAD]
    for rows in (GPU_COUNTS, SLICES):
        parts += ["\n".join(table(size, rows)) + "\n" for size in SIZES]
    few = [row for row in GPU_COUNTS if row[2] in (1, 8)]
    parts += [SAMPLING, "\n".join(samples(few + SLICES)) + "\n"]
    parts += [AGAINST, "\n".join(runs()) + "\n", SOURCES, "\n".join(sources()) + "\n", END]
    return "\n".join(parts)


def main() -> None:
    with atomic(PAGE) as temporary:
        temporary.write_text(document())


if __name__ == "__main__":
    main()
