"""report.md of the records, with its pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.hour.record import DONE, Record, bad
from benchmarks.hour.work import Settings
from ppflow_jax.files.disk import atomic

Rows = list[dict[str, Any]]
SHARE_AIM, RATIO_AIM = 0.5, 0.9  # of training steps: of the ceiling, and of PyTorch's time


def write(settings: Settings, parts: Sequence[str]) -> None:
    """What the records say, whatever there is of them."""
    records = {name: settings.record(name) for name in parts}
    lines = [*_head(settings), *_states(records)]
    for name, record in records.items():
        good = [row for row in record.rows if "error" not in row]
        if good:
            lines += ["", f"## {TITLES[name]}", "", *TABLES[name](good)]
        failed = [row for row in record.rows if bad(row)]
        lines += ["", *(f"* **failed** {line}" for line in record.bad())] if failed else []
        if record.values["left"]:
            lines += ["", f"Not done: {'; '.join(record.values['left'])}."]
    lines += [] if settings.tiny else _aims(records)
    lines += _pictures(settings.out, records)
    with atomic(settings.out / "report.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def _head(settings: Settings) -> Iterator[str]:
    yield "# An hour with a device"
    yield ""
    device = settings.device if (settings.out / "device.json").exists() else {}
    if device:
        versions = ", ".join(f"{name} {v}" for name, v in device["libraries"].items())
        memory = f", {device['memory'] / 1e9:.0f} GB for JAX" if device["memory"] else ""
        peak = f", {device['peak'] / 1e12:.0f} TFLOP/s stated in bfloat16" if device["peak"] else ""
        yield f"{device['kind']} ({device['platform']}){memory}{peak}; {versions}."
    if settings.tiny:
        yield ""
        yield "**--tiny: small models and few rounds; no figure here says anything about speed.**"
    yield ""


def _states(records: dict[str, Record]) -> Iterator[str]:
    yield from _table(
        ("part", "state", "seconds", "rows", "why"),
        (
            (n, r.state or "not begun", f"{r.values['seconds']:.0f}", str(len(r.rows)), _why(r))
            for n, r in records.items()
        ),
    )


def _aims(records: dict[str, Record]) -> Iterator[str]:
    """What training steps should reach."""
    found = []
    for row in records["speed"].rows:
        if row.get("kind") == "train" and not bad(row):
            said = f"{row['of_ceiling']:.0%} of the ceiling, {SHARE_AIM:.0%} or more"
            found.append((row["key"], said, row["of_ceiling"] >= SHARE_AIM))
    for row in records["peer"].rows:
        if row["key"].startswith("train") and not bad(row):
            said = f"{row['ratio']:.2f} of PyTorch's time, at most {RATIO_AIM:g}"
            found.append((row["key"], said, row["ratio"] <= RATIO_AIM))
    if found:
        yield from ("", "## Aims", "")
        yield from (
            f"* {key}: {said}: {'reached' if ok else '**missed**'}" for key, said, ok in found
        )


def _why(record: Record) -> str:
    return record.values["reason"].replace("|", "/")


def _table(head: Sequence[str], rows: Any) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _parity(rows: Rows) -> list[str]:
    head = ("comparison", "relative difference", "at most", "")
    each = ((r["key"], f"{r['value']:.1e}", f"{r['bound']:g}", _mark(r)) for r in rows)
    return _table(head, each)


def _mark(row: dict[str, Any]) -> str:
    return "**over**" if bad(row) else "good"


def _attention(rows: Rows) -> list[str]:
    choices = [f"* {r['key']}: {r['said']}" for r in rows if "forward_ms" not in r]
    head = ("program", "images, tokens, heads, width", "forward ms", "with backward ms")
    head += ("differs forward", "backward", "")
    each = (
        (
            *(r["program"], " x ".join(map(str, r["shape"]))),
            *(f"{r['forward_ms']:.3f}", f"{r['backward_ms']:.3f}"),
            *(f"{r['forward']:.1e}", f"{r['backward']:.1e}", _mark(r)),
        )
        for r in rows
        if "forward_ms" in r
    )
    return [*choices, "", *_table(head, each)]


def _speed(rows: Rows) -> list[str]:
    head = (
        "work",
        "attention",
        "batch",
        "images/s",
        "s a call",
        "quartiles",
        "of the ceiling",
        "of peak",
    )
    head += ("ceiling TFLOP/s", "GB by the compiler", "GB peak", "compile s")
    each = (
        (
            *(r["key"], r["attention"], str(r["batch"])),
            *(f"{r['images_per_second']:.1f}", f"{r['seconds']:.4f}"),
            "{:.4f}-{:.4f}".format(*r["quartiles"]),
            f"{r['of_ceiling']:.0%}",
            "" if r["of_peak"] is None else f"{r['of_peak']:.0%}",
            *(f"{r['ceiling'] / 1e12:.1f}", f"{r['memory_bytes'] / 1e9:.1f}"),
            _peak(r),
            f"{r['compile_seconds']:.1f}",
        )
        for r in rows
    )
    note = "GB peak is what the device saw at once; <= where an earlier row had more."
    return [*_table(head, each), "", note]


def _peak(row: dict[str, Any]) -> str:
    if row["peak_bytes"] is None:
        return ""
    return f"{'' if row['peak_grew'] else '<= '}{row['peak_bytes'] / 1e9:.1f}"


def _peer(rows: Rows) -> list[str]:
    head = ("work", "batch", "ours ms", "PyTorch ms", "its way", "ours/PyTorch", "")
    each = (
        (
            *(r["key"], str(r["batch"]), f"{1e3 * r['ours']:.1f}", f"{1e3 * r['theirs']:.1f}"),
            *(r["way"], f"{r['ratio']:.2f}", _mark(r)),
        )
        for r in rows
    )
    return [*_table(head, each), "", f"{rows[0]['versions']}."]


def _accelerate(rows: Rows) -> list[str]:
    head = ("model", "row", "evaluations", "batch", "s", "of SiT's time", "of SiT's FLOPs")
    each = (
        (
            *(r["model"], r["name"], str(r["nfe"]), str(r["batch"]), f"{r['seconds']:.3f}"),
            *(f"{r['latency']:.3f}", f"{r['flops']:.3f}"),
        )
        for r in rows
    )
    return _table(head, each)


def _plans(rows: Rows) -> list[str]:
    head = (
        "size",
        "batch",
        "SiT, evaluations",
        "s",
        "plan, evaluations",
        "s",
        "faster",
        "by FLOPs",
    )
    each = (
        (
            *(r["size"], str(r["batch"]), str(r["steps"]), f"{r['sit_seconds']:.3f}"),
            *(str(p["evaluations"]), f"{p['seconds']:.4f}"),
            *(f"{p['faster']:.1f}x", f"{p['flops_ratio']:.1f}x"),
        )
        for r in rows
        for p in r["plans"]
    )
    return _table(head, each)


def _training(rows: Rows) -> list[str]:
    return [f"* {row['key']}: {row['said']}" for row in rows]


TITLES = {
    "parity": "Parity with float32 on CPU",
    "attention": "Attention",
    "speed": "Training steps and sampling, bfloat16",
    "peer": "Beside PyTorch",
    "accelerate": "Accelerators",
    "plans": "Plans against SiT's guided Euler steps, random weights",
    "training": "Training",
}
TABLES: dict[str, Callable[[Rows], list[str]]] = {
    "parity": _parity,
    "attention": _attention,
    "speed": _speed,
    "peer": _peer,
    "accelerate": _accelerate,
    "plans": _plans,
    "training": _training,
}


def _pictures(out: Path, records: dict[str, Record]) -> list[str]:
    """Draws what there is, and links it."""
    made = []
    speed = [r for r in records["speed"].rows if "error" not in r]
    if speed:
        _bars(speed, out / "images_per_second.png")
        made.append("images_per_second.png")
    loss = [r["loss"] for r in records["training"].rows if r["key"] == "train" and "loss" in r]
    if loss:
        _line(loss[0], out / "loss.png")
        made.append("loss.png")
    if records["training"].state == DONE and (out / "grid.png").exists():
        made.append("grid.png")
    return ["", *(f"![{name.split('.')[0].replace('_', ' ')}]({name})" for name in made)]


def _bars(rows: Rows, path: Path) -> None:
    figure, axes = _axes(1.5 + 0.35 * len(rows))
    names = [row["key"] for row in rows][::-1]
    values = [row["images_per_second"] for row in rows][::-1]
    bars = axes.barh(names, values)
    axes.bar_label(bars, [f"{v:.4g}" for v in values], padding=3, fontsize=8)
    axes.set(xlabel="images/s")
    axes.margins(x=0.12)
    _save(figure, path)


def _line(points: Sequence[tuple[int, float]], path: Path) -> None:
    figure, axes = _axes(3.2)
    axes.plot(*zip(*points), marker="." if len(points) < 20 else None, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    _save(figure, path)


def _axes(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
