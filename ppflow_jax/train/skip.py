"""Steps whose loss or gradient is not finite: left out, or the end of a run.

With `config.train.skip_nonfinite` = K such a step changes nothing but the counts that the state
keeps, up to K in a row; with 0 the first one ends the run.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppflow_jax.checkpoints.run import Checkpoints
from ppflow_jax.console import say
from ppflow_jax.data.pipeline import Stream
from ppflow_jax.errors import RunError
from ppflow_jax.flow.terms import Metrics
from ppflow_jax.train.metrics_log import MetricWriter

SKIPPED = "skipped"  # in the state: how many steps, int32, all and those just now in a row
IN_A_ROW = "skipped_in_a_row"  # in the metrics
MOST_SHOWN = 32  # numbers of examples in a line


def no_counts() -> dict[str, jax.Array]:
    """The counts of a run that has skipped nothing."""
    return {"total": jnp.zeros((), jnp.int32), "row": jnp.zeros((), jnp.int32)}


def unless_finite(
    before: dict[str, Any], after: dict[str, Any], metrics: Metrics
) -> tuple[dict[str, Any], Metrics]:
    """The state `after` a step if its metrics are finite, else `before` at the next step.

    `before` has the counts, `after` need not. The metrics get both counts, float32.
    """
    good = jnp.all(jnp.stack([jnp.isfinite(value) for value in metrics.values()]))
    counts = before[SKIPPED]
    row = jnp.where(good, 0, counts["row"] + 1)
    total = counts["total"] + jnp.where(good, 0, 1)
    kept = {
        name: jax.tree.map(lambda new, old: jnp.where(good, new, old), tree, before[name])
        for name, tree in after.items()
        if name != "step"
    }
    told = {SKIPPED: total.astype(jnp.float32), IN_A_ROW: row.astype(jnp.float32)}
    state = {"step": after["step"], SKIPPED: {"total": total, "row": row}, **kept}
    return state, metrics | told


class Watch:
    """Reads the metrics of every step, and says what was skipped.

    Args:
      allowed: steps in a row that may be skipped.
    """

    def __init__(
        self, stream: Stream, checkpoints: Checkpoints, writer: MetricWriter, allowed: int
    ):
        self._stream, self._checkpoints, self._writer = stream, checkpoints, writer
        self._allowed = allowed

    def __call__(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Metrics of a step on the host; of one that was skipped those that are finite.

        Raises:
          RunError: loss or gradient is not finite, once too often; nothing of it has been saved.
        """
        values = {name: float(value) for name, value in metrics.items()}
        row = int(values.pop(IN_A_ROW, 0))
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        if bad and (row > self._allowed or not row):
            raise RunError(self._end(step, bad, row))
        if bad:
            self._tell(step, bad, row, values[SKIPPED])
        return {name: value for name, value in values.items() if name not in bad}

    def _tell(self, step: int, bad: list[str], row: int, total: float) -> None:
        if jax.process_index():
            return
        examples = self._stream.examples(step - 1).tolist()
        self._writer.note(step, {"not_finite": bad, SKIPPED: total, "examples": examples})
        shown = ", ".join(map(str, examples[:MOST_SHOWN]))
        more = f" and {len(examples) - MOST_SHOWN} more" if len(examples) > MOST_SHOWN else ""
        suspect = self._stream.suspect(step - 1)
        say(
            f"step {step} is left out, {', '.join(bad)} not finite ({row} in a row, at most "
            f"{self._allowed}; {total:.0f} in all): {f'{suspect}; ' if suspect else ''}"
            f"examples {shown}{more}"
        )

    def _end(self, step: int, bad: list[str], row: int) -> str:
        self._checkpoints.wait()
        latest = self._checkpoints.latest()
        kept = (
            "no checkpoint was saved"
            if latest is None
            else f"the checkpoint of step {latest} is good"
        )
        example = self._stream.suspect(step - 1)
        remedy = (
            f"{example}: mend or remove it"
            if example
            else "lower config.optim.lr, set config.optim.clip=1, or use config.model.dtype=float32"
        )
        where = f"at step {step}"
        if row:
            where += f", {row} steps in a row (config.train.skip_nonfinite={self._allowed})"
        return f"{', '.join(bad)} not finite {where}; {kept}: {remedy}"
