"""A comparison with a bound, and how the parity programs print theirs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One comparison; `error` is in the unit of `bound` (see `kind`)."""

    name: str
    error: float
    bound: float
    kind: str = "max abs"

    @property
    def ok(self) -> bool:
        return bool(self.error <= self.bound)  # a NaN error is not ok


def report(rows: Iterable[Row]) -> int:
    """Print every row as it comes, then their number; exit code 1 if one is over or none came."""
    count, over = 0, []
    for row in rows:
        verdict = "ok" if row.ok else "OVER"
        print(f"{row.error:9.2e}  {row.bound:8.1e}  {row.kind:18}{verdict:6}{row.name}", flush=True)
        count += 1
        if not row.ok:
            over.append(row)
    print(f"{count} comparisons, {len(over)} over their bound")
    for row in over:
        print(f"  {row.error:.2e} > {row.bound:.1e}  {row.name}")
    return int(bool(over) or not count)
