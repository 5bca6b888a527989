"""Stopping when asked: SIGTERM (a scheduler takes the machine) and Ctrl-C."""

from __future__ import annotations

import os
import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """While the context is open, a signal does not end the process but is remembered.

    With several processes a signal to any of them stops all, at one step: jax's preemption service
    passes SIGTERM on and picks the step. A second Ctrl-C ends the process at once.
    """

    def __enter__(self) -> StopRequest:
        self._asked = False
        self._together = jax.process_count() > 1
        self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._interrupt)}
        if not self._together:  # else the preemption service listens for it
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reached(self, step: int) -> bool:
        """Whether `step` is to be the last; call after every step, in all processes."""
        if self._together:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _ask(self, *_: int | FrameType | None) -> None:
        self._asked = True

    def _interrupt(self, *_: int | FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # print may have been interrupted itself
        os.write(2, b"\nstopping after this step; Ctrl-C again to stop at once\n")
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._asked = True
