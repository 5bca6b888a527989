"""One awkward input and what the command must make of it."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from tests import commands


class Outcome(NamedTuple):
    """How a command ended: exit code (None: an exception escaped), stdout, stderr."""

    code: int | None
    out: str
    err: str


@dataclass(frozen=True)
class Case:
    """
    Attributes:
      name: what is awkward about it.
      command: module of ppflow_jax, such as "convert.__main__" or "prepare".
      args: flags.
      code: expected exit code: 0, or 1 or 2 with one line on stderr.
      says: regular expression that stdout and stderr together must contain.
      check: looks at what was written; returns what is wrong, or None.
    """

    name: str
    command: str
    args: tuple[str, ...]
    code: int = 0
    says: str = ""
    check: Callable[[], str | None] = lambda: None

    def problem(self) -> str | None:
        """Run it; what is wrong with the outcome, or None."""
        found = self.outcome()
        if found.code is None:
            return f"traceback: {found.err.strip().splitlines()[-1]}"
        last = found.err.strip().splitlines()[-1:] or [""]
        if found.code != self.code:
            return f"exit code {found.code}, expected {self.code}: {last[0][:300]}"
        if "Traceback" in found.err:
            return "a traceback on stderr"
        if not re.search(self.says, found.out + found.err, re.DOTALL):
            return f"does not say {self.says!r}: {(found.out + found.err)[-300:]}"
        return self.check()

    def outcome(self) -> Outcome:
        try:
            return Outcome(*commands.run(self.command, *self.args))
        except Exception:
            return Outcome(None, "", traceback.format_exc())
