"""What a compiled program sends between devices, read from its HLO text."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|[fsu]\d+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
    r"\{([^}]*)\}"
)


@dataclass(frozen=True)
class Collective:
    """One operation of the program.

    Attributes:
      kind: one of `KINDS`.
      size: bytes of the whole array: gathered, reduced or moved (an all-gather's result, a
        reduce-scatter's operand), of an all-to-all that of one device.
      elements: numbers in each of its arrays.
      times: executions in one run of the program.
      group: devices that take part together, one group as an example.
      op_name: where it comes from, in jax's words.
    """

    kind: str
    size: int
    elements: tuple[int, ...]
    times: int
    group: tuple[int, ...]
    op_name: str

    @property
    def sent(self) -> float:
        """Bytes that each device sends in one run, by ring algorithms."""
        n = len(self.group)
        if self.kind == "collective-permute":
            return float(self.times * self.size)
        share = 2.0 if self.kind == "all-reduce" else 1.0
        return self.times * self.size * share * (n - 1) / n


def collectives(hlo: str) -> list[Collective]:
    """Every collective of a compiled program that moves data, with its number of executions.

    Bodies of loops count as often as they run. The TPU compiler may spread a collective over
    several fusions, to overlap it with their work: parts of one channel and shape count once. It
    writes a reduce-scatter as a fusion of that name around an all-reduce.

    Raises:
      ValueError: collectives whose number of executions cannot be read: in a loop of unknown
        length, or called in a way that is not known here.
    """
    operations = _computations(hlo)
    found, parts = [], set()
    fused = set(re.findall(r" fusion\(.*?calls=%?([\w.\-]+)", hlo))
    executions = _executions(hlo, operations)
    for name in operations.keys() - executions.keys():
        if any(operation.startswith(KINDS) for _, _, operation, _ in operations[name]):
            raise ValueError(f"a collective that nothing is seen to call, computation {name}")
    for name, times in executions.items():
        started: dict[str, str] = {}
        for result, shape, operation, rest in operations[name]:
            kind = operation.removesuffix("-start").removesuffix("-done")
            if kind not in KINDS:
                continue
            if operation.endswith("-start"):
                started[result] = rest
                continue
            if operation.endswith("-done"):
                rest = started[rest.split(")")[0].split("%")[-1].split(" ")[-1]]
            group = _group(rest)
            if len(group) < 2:
                continue
            arrays = [(dtype, _count(dims)) for dtype, dims in _SHAPE.findall(shape)]
            if name in fused and (channel := _CHANNEL.search(rest)):
                part = (channel[1], *arrays)
                if part in parts:
                    continue
                parts.add(part)
            if times is None:
                raise ValueError(f"{kind} in a loop of unknown length, computation {name}")
            size = sum(_BYTES.get(dtype, 4) * count for dtype, count in arrays)
            if kind == "reduce-scatter":
                size *= len(group)
            elif name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            match = _OP_NAME.search(rest)
            op_name = match[1] if match else ""
            elements = tuple(count for _, count in arrays)
            found.append(Collective(kind, size, elements, times, group, op_name))
    return found


def _computations(hlo: str) -> dict[str, list[tuple[str, str, str, str]]]:
    """(result, shape, operation, operands and attributes) of every line, by computation."""
    operations: dict[str, list[tuple[str, str, str, str]]] = {}
    lines: list[tuple[str, str, str, str]] = []
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            lines = operations[match[2]] = []
        elif match := _OPERATION.match(line):
            lines.append(match.groups())
    return operations


def _executions(hlo: str, operations) -> dict[str, int | None]:
    """How often each computation runs; None where a loop's length is unknown."""
    entry = next(m[2] for line in hlo.splitlines() if (m := _COMPUTATION.match(line)) and m[1])
    times: dict[str, int | None] = defaultdict(int)

    def visit(name: str, count: int | None) -> None:
        times[name] = None if count is None or times[name] is None else times[name] + count
        for _, _, operation, rest in operations.get(name, ()):
            if operation in ("async-done", "async-update"):
                continue
            trips: int | None = 1
            if operation == "while":
                trips = _trips(rest, operations)
            for role, callees in _CALLED.findall(rest):
                if role == "to_apply" and operation not in ("call", "call-start"):
                    continue
                for callee in re.findall(r"[\w.\-]+", callees):
                    visit(callee, None if trips is None or count is None else count * trips)

    visit(entry, 1)
    return {name: count for name, count in times.items() if name in operations}


def _trips(rest: str, operations) -> int | None:
    """Rounds of a loop: as stated, or the one number its condition compares the counter with."""
    if known := _TRIPS.search(rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", rest)[1]
    bounds = [
        int(rest.split(")")[0])
        for _, shape, operation, rest in operations[condition]
        if operation == "constant" and _SHAPE.match(shape) and rest.split(")")[0].isdecimal()
    ]
    return bounds[0] if len(bounds) == 1 else None


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _count(dims: str) -> int:
    return math.prod(_numbers(dims)) if dims else 1


def _group(rest: str) -> tuple[int, ...]:
    """Devices of the first group, in any of the notations of HLO."""
    if match := _LISTED.search(rest):
        return tuple(_numbers(match[1].split("}")[0].strip("{")))
    if match := _IOTA.search(rest):
        shape, dims, order = match.groups()
        ids = np.arange(np.prod(_numbers(dims))).reshape(_numbers(dims))
        ids = ids.transpose(_numbers(order)) if order else ids
        return tuple(ids.reshape(_numbers(shape))[0].tolist())
    if match := _NAMED.search(rest):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        sizes = [int(size) for size in axes.values()]
        ids = np.arange(np.prod(sizes))
        if match[2]:
            ids = ids.reshape(_numbers(match[2]))
            ids = ids.transpose(_numbers(match[3])) if match[3] else ids
        ids = ids.reshape(sizes)
        used = re.findall(r"'(\w+)'", match[4])
        index = tuple(slice(None) if axis in used else 0 for axis in axes)
        return tuple(np.ravel(ids[index]).tolist())
    return ()
