"""The checkpoints of a run: saved in the background, never half-written, never mixed up."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from ppflow_jax.checkpoints.card import Card, read_card
from ppflow_jax.errors import InputError, RunError
from ppflow_jax.files import checksums, lease
from ppflow_jax.files.copies import upload_folder
from ppflow_jax.files.place import ObjectPath
from ppflow_jax.files.scratch import scratch
from ppflow_jax.files.store import (
    COMMITTED,
    EXEMPT,
    FOLDER,
    here,
    readable,
    reason,
    steps_in,
    verify,
)


class Checkpoints:
    """The checkpoints of one workdir, saved in the background, the newest `keep` kept.

    Those of an object store are written on this machine first, and uploaded in the background.
    Several processes, which have no disk in common, write theirs to `gs://` by TensorStore.
    """

    def __init__(self, workdir: Path, card: Card, *, keep: int):
        self.card = card
        self.folder, self._keep = workdir / FOLDER, keep
        self._remote = isinstance(self.folder, ObjectPath)
        self._uploads = self._remote and jax.process_count() == 1
        self._written_in = scratch(FOLDER) if self._uploads else self.folder
        self._saving = 0
        _one_line_for_a_failed_write()
        self.manager = ocp.CheckpointManager(
            str(self._written_in) if self._remote else self._written_in,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=1 if self._uploads else keep,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,  # what a killed run was writing
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )

    def latest(self) -> int | None:
        """Latest step, be it damaged or not: what is lost must be said."""
        return max(steps_in(self.folder), default=None)

    def save(self, step: int, state: Any) -> None:
        """Start writing; the state may be donated as soon as this returns.

        Raises:
          RunError: this checkpoint, or the one before in the background, cannot be written.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(self.card.to_json())
        )
        with self._written():
            self.manager.wait_until_finished()
            self._saving = step
            self.manager.save(step, args=args)

    def check(self) -> None:
        """Raise what went wrong in the background, without waiting.

        Raises:
          RunError: the checkpoint cannot be written.
        """
        if not self.manager.is_saving_in_progress():
            with self._written():
                self.manager.wait_until_finished()

    def restore(self, step: int, abstract: Any) -> Any:
        """State of `step`, placed as `abstract` (shapes, dtypes and shardings) says.

        Raises:
          InputError: damaged or not readable.
        """
        path = self.folder / str(step)
        with _saying_what_is_intact(self.folder, step):
            verify(path, together=True)
        if self._remote:
            with readable(path), here(path) as folder:
                return ocp.StandardCheckpointer().restore(folder / "state", abstract)
        with readable(path):
            return self.manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            )["state"]

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
          RunError: the last checkpoint cannot be written.
        """
        with self._written():
            self.manager.wait_until_finished()

    def close(self) -> None:
        """`wait`, and no more saving after that."""
        self.wait()
        self.manager.close()

    def _seal(self) -> None:
        # Orbax calls this in process 0, in the background, when all hosts have written and
        # before it renames the folder.
        if self._remote and not self._uploads:  # where nothing is renamed
            checksums.write(self.folder / str(self._saving), exempt=EXEMPT)
            return
        folder = self._written_in / f"{self._saving}{ocp.utils.TMP_DIR_SUFFIX}"
        checksums.write(folder, exempt=EXEMPT)
        if self._uploads:
            self._upload(folder)

    def _upload(self, folder: Path) -> None:
        """The step is there when its checksums are; then older ones go, their checksums first."""
        target = self.folder / str(self._saving)
        lease.check(target)
        target.rmtree()  # what a killed run was writing
        upload_folder(folder, target, checksums.NAME)
        (target / COMMITTED).write_text("")  # else Orbax in several processes removes the step
        newest = [str(step) for step in steps_in(self.folder)[-self._keep :]]
        for path, _ in self.folder.children():
            if path.name.isdigit() and path.name not in newest:
                (path / checksums.NAME).unlink(missing_ok=True)
                path.rmtree()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # TensorStore reports a full disk as a ValueError, among others
            latest = self.latest()
            kept = "no checkpoint is there" if latest is None else f"that of step {latest} is good"
            raise RunError(
                f"cannot write the checkpoint of step {self._saving} to {self.folder} "
                f"({reason(e)}); {kept}: see that the disk has room, and run the same command "
                "again"
            ) from e


def latest_card(workdir: Path) -> tuple[int, Card] | None:
    """Step and card of the latest checkpoint, None without one; makes and changes nothing.

    Raises:
      InputError: the card is damaged or not readable.
    """
    folder = workdir / FOLDER
    if not (steps := steps_in(folder)):
        return None
    with _saying_what_is_intact(folder, steps[-1]):
        return steps[-1], read_card(folder / str(steps[-1]))


@contextlib.contextmanager
def _saying_what_is_intact(folder: Path, step: int) -> Iterator[None]:
    """Add to what is said of the checkpoint of `step` which one before it is good."""
    try:
        yield
    except InputError as e:
        raise InputError(f"{e}; {_intact_before(folder, step)}") from e


def _intact_before(folder: Path, damaged: int) -> str:
    for step in reversed([s for s in steps_in(folder) if s < damaged]):
        try:
            verify(folder / str(step))
        except InputError:
            continue
        return f"that of step {step} is intact"
    return "no earlier one is intact"


@functools.cache
def _one_line_for_a_failed_write() -> None:
    """Silence what is written about a failed write beside the error that is raised for it.

    Orbax logs that error up to three times from its threads, asyncio those of the other files, and
    TensorStore complains that nobody waits for its answers any more.
    """

    def from_orbax(record: logging.LogRecord) -> bool:
        return bool(record.exc_info) and "orbax" in record.pathname + record.getMessage()

    for logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
        logger.addFilter(lambda record: not from_orbax(record))
    before = sys.unraisablehook

    def unraisable(args: Any) -> None:
        if str(args.exc_value) != "Event loop is closed":
            before(args)

    sys.unraisablehook = unraisable
