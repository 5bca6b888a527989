"""A dry run as a person reads it."""

from __future__ import annotations

import math
import textwrap

from ml_collections import ConfigDict

from ppflow_jax.console import table
from ppflow_jax.cost.calibration import sampling_counts, training_counts
from ppflow_jax.cost.dry_run import Compiled, Report
from ppflow_jax.cost.estimate import SAMPLES, Times, examples
from ppflow_jax.cost.published import REACHED
from ppflow_jax.generate.plan import make_plan

HOST = 2e-3  # seconds that a host needs to start a step


def text(report: Report) -> str:
    """Memory, FLOPs, what crosses the mesh, and the estimate of hours."""
    mesh, target = report.mesh, report.target
    rows = [("", "bytes a device", "of the whole")]
    for name, size in report.parts.items():
        whole = f"1/{report.whole[name] / size:.2f}" if name in report.whole else ""
        rows.append((name, f"{size:,}", whole))
    lines = [
        f"{report.parameters:,} parameters on {target.name}, mesh {dict(mesh.shape)}",
        *([report.chosen] if report.chosen else []),
        textwrap.indent(table(rows), "  "),
    ]
    for program in report.programs:
        lines += ["", *_program(report, program)]
    if report.peak is not None:
        fits = "" if target.chip is None else ", does not fit" if report.misfit else ", fits"
        rough = " (roughly, by formula)" if target.rough else ""
        lines += ["", f"peak {report.peak / 1e9:.2f} GB a device{fits}{rough}"]
    return "\n".join([*lines, "", *_estimate(report)])


def _program(report: Report, program: Compiled) -> list[str]:
    lines = [f"{program.name}: {program.flops / 1e12:,.2f} TFLOPs by formula"]
    if program.failure:
        return [*lines, f"  out of memory: {program.failure}"]
    rough = ", roughly, by formula" if report.target.rough else ""
    lines.append(f"  temporaries {program.temporaries:,} bytes a device{rough}")
    rows = [("collective", "operations", "runs", "MB sent", "cause")]
    for why, kind, operations, runs, sent in report.causes(program):
        rows.append((kind, str(operations), str(runs), f"{sent / 1e6:,.1f}", why))
    lines.append(textwrap.indent(table(rows, left=(0, 4)), "  "))
    if report.target.chip:
        limits = report.seconds(program)
        parts = ", ".join(f"{name} {1e3 * s:,.2f} ms" for name, s in limits.items())
        lines.append(f"  at least, by published peaks: {parts} (an estimate, not measured)")
    return lines


def _estimate(report: Report) -> list[str]:
    """Epochs, and where there is a basis for it images/s and hours."""
    config = report.experiment.config
    steps, batch = config.train.steps, config.data.batch_size
    count, whose = examples(config)
    epochs = f"{steps * batch / count:,.1f} epochs of {count:,} examples ({whose})"
    done = f"{steps:,} steps of {batch:,} images: {epochs if count else f'epochs unknown, {whose}'}"
    head, seconds = _seconds(report)
    if not seconds:
        return [done]
    train = seconds[report.programs[0].name]
    rows = [
        head,
        ("images/s of training", *(f"{batch / s:,.0f}" for s in train)),
        (f"{steps:,} steps", *(duration(steps * s) for s in train)),
    ]
    notes = [done]
    for program in report.programs[1:]:
        runs = math.ceil(SAMPLES / program.images)
        times = (duration(runs * s) for s in seconds[program.name])
        rows.append((f"{SAMPLES:,} samples", *times))
        notes.append(_sampled(config, program))
    return [*_legend(report, train[0]), textwrap.indent(table(rows), "  "), *notes]


def _sampled(config: ConfigDict, program: Compiled) -> str:
    how = config.sample
    scales = ", ".join(f"{s:g}" for s in how.cfg)
    return (
        f"{SAMPLES:,} samples by {how.solver}, {how.steps} intervals, guidance {scales}, "
        f"{program.images:,} at a time (config.sample), without decoding"
    )


def _seconds(report: Report) -> tuple[tuple[str, ...], dict[str, tuple[float, ...]]]:
    """Head of the table and columns of every program; nothing where there is no basis."""
    target, programs = report.target, report.programs
    if any(p.temporaries is None for p in programs):
        return (), {}
    if target.measured:
        return ("", "at best", "at worst"), _measured(report)
    if target.chip is None:
        return (), {}
    reached = REACHED[target.kind]
    head = ("", "limits", *(f"at {share.value:.0%} of peak" for share in reached))
    return head, {p.name: Times.of(report.seconds(p), reached) for p in programs}


def _measured(report: Report) -> dict[str, tuple[float, ...]]:
    """Seconds of every program, at least and at most, by the calibration of this machine."""
    experiment, measured = report.experiment, report.target.measured
    model, objective = experiment.card.model, experiment.objective
    segments = make_plan(experiment.card, experiment.sampler).segments
    found = {}
    for index, program in enumerate(report.programs):
        facts = (report.parameters, program.images / report.mesh.size)
        if index:
            counts = sampling_counts(model, segments, *facts)
        else:
            counts = training_counts(model, objective.pattern, *facts, objective.evaluated)
        found[program.name] = measured.fits["sample" if index else "train"].range(counts)
    return found


def _legend(report: Report, step: float) -> list[str]:
    """What the columns mean, and what they leave out."""
    if measured := report.target.measured:
        when = f"from programs timed on this machine ({measured.device}) on {measured.date[:10]}"
        more = "; what devices send each other is not counted" if report.mesh.size > 1 else ""
        return [f"Estimate, {when}{more}"]
    best, diffusion = REACHED[report.target.kind]
    lines = [
        "Estimate, not measured",
        "  limits: published peaks, with all transfers hidden",
        f"  {best.value:.0%}: the most of public runs, {best.source}",
        f"  {diffusion.value:.0%}: {diffusion.source}",
    ]
    if (dtype := report.experiment.config.model.dtype) != "bfloat16":
        lines.append(f"  peaks are of bfloat16, this run computes in {dtype}, which is slower")
    if step < HOST:
        lines.append("  steps this short wait for the host, which is not counted")
    return lines


def duration(seconds: float) -> str:
    """With its unit, two digits or more."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2g} s"
