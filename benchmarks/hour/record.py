"""What a part has found so far: one JSON file, written whole after every row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppflow_jax.errors import InputError
from ppflow_jax.files.disk import atomic

RUNNING, DONE, CUT, FAILED, SKIPPED = "running", "done", "cut", "failed", "skipped"


class Record:
    """The file of a part.

    `state` is `running` while its process works (and after a kill of it all), `done`, `cut` (time
    was over: what is missing is in `left`), `failed` or `skipped`; `reason` says why. A row has
    its `key`, and `error` where it failed or `good`, False where a bound was exceeded.

    Raises:
      InputError: a file that is no record.
    """

    def __init__(self, path: Path, part: str):
        self.path = path
        self.values: dict[str, Any] = {"part": part, "state": "", "reason": "", "seconds": 0.0}
        self.values |= {"left": [], "rows": []}
        if path.exists():
            try:
                found = json.loads(path.read_text())
                self.values |= {"rows": [dict(row) for row in found["rows"]]}
                self.values |= {name: found[name] for name in self.values if name != "rows"}
            except (ValueError, KeyError, TypeError) as e:
                raise InputError(f"{path} is no record of a part: remove it ({e!r})") from e

    @property
    def state(self) -> str:
        return self.values["state"]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.values["rows"]

    def has(self, key: str) -> bool:
        """Whether a row is there and good; others are done again."""
        return any(row["key"] == key and not bad(row) for row in self.rows)

    def add(self, key: str, row: dict[str, Any]) -> None:
        """A row, in place of one with that key."""
        kept = [old for old in self.rows if old["key"] != key]
        self.write(rows=[*kept, {"key": key} | row])

    def write(self, **values: Any) -> None:
        self.values |= values
        with atomic(self.path) as temporary:
            temporary.write_text(json.dumps(self.values, indent=1) + "\n")

    def bad(self) -> Iterator[str]:
        """A line for every row that failed."""
        for row in self.rows:
            if bad(row):
                yield f"{row['key']}: {row.get('error') or 'over its bound'}"


def bad(row: dict[str, Any]) -> bool:
    return "error" in row or row.get("good") is False
