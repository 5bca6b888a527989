"""Folders of arrays: orbax, a JSON that says what they are, and checksums.

    FOLDER/checkpoints/STEP/{state,config,SHA256SUMS}

A folder is written under a temporary name, is given the checksums of its files when all are there,
and is only then renamed. Every reading compares them, so that damage is never used. In an object
store nothing is renamed: there `SHA256SUMS` is uploaded last, and a step without it does not count.
Arrays are read from a copy on this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ppflow_jax.errors import InputError
from ppflow_jax.files import checksums, lease
from ppflow_jax.files.copies import copied, here, upload_folder
from ppflow_jax.files.disk import locked, writable_directory
from ppflow_jax.files.hub import fetched, is_hub
from ppflow_jax.files.objects import Damaged, StoreError
from ppflow_jax.files.place import ObjectPath, place
from ppflow_jax.files.scratch import scratch

FOLDER = "checkpoints"


CONFIG = "config/metadata"


COMMITTED = "commit_success.txt"  # Orbax writes it last
# With its times and handler names, completed after the checksums; no reading depends on them.
EXEMPT = ("_CHECKPOINT_METADATA", COMMITTED)


def digest(path: str | Path) -> str:
    """SHA-256 that names the content of a checkpoint, `path` being as in `find_checkpoint`.

    It is that of the files: a copy has the same, a second save of equal arrays has not.

    Raises:
      InputError: no checkpoint, or one without checksums.
    """
    path = find_checkpoint(path)
    with readable(path):
        return checksums.digest(path)


def verify(path: Path, together: bool = False) -> None:
    """Compare all files of a checkpoint with their checksums.

    Args:
      together: all processes call this at once; each reads its part of the files, and all fail
        if one does.

    Raises:
      InputError: a file is damaged, missing or too many.
    """
    index, count = (jax.process_index(), jax.process_count()) if together else (0, 1)
    if isinstance(path, ObjectPath):
        with readable(path):
            copied(path)
        return
    with readable(path):
        bad = checksums.first_damaged(path, EXEMPT, index, count)
        if count > 1:
            mine = np.int32(-1 if bad is None else bad)
            worst = int(np.max(multihost_utils.process_allgather(mine)))
            bad = None if worst < 0 else worst
        if bad is not None:
            name = checksums.names(path, EXEMPT)[bad]
            raise ValueError(f"{name} is not as it was written: see {checksums.NAME}")


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong in the block into one line about the checkpoint at `path`."""
    # Orbax and TensorStore report damage with many exception types.
    try:
        yield
    except StoreError as e:
        if isinstance(e, Damaged):
            raise _damaged(path, e) from e
        raise InputError(f"cannot read checkpoint {path} ({e.strerror})") from e
    except Exception as e:
        raise _damaged(path, e) from e


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"checkpoint {path} is damaged or incomplete ({reason(error)}): remove that folder to go "
        "on from the one before, or give another checkpoint"
    )


def reason(error: BaseException) -> str:
    """The telling part of an exception: TensorStore puts the system's words last."""
    if isinstance(error, StoreError):
        return error.strerror
    text = str(error).strip().rsplit('": ', 1)[-1]
    return text.splitlines()[0][:200] if text else type(error).__name__


def steps_in(folder: Path) -> list[int]:
    """Steps that have a folder, in order; unfinished ones have another name."""
    if not folder.is_dir():
        return []
    if isinstance(folder, ObjectPath):
        names = (p.name for p, is_folder in folder.children() if is_folder and p.name.isdigit())
        return sorted(int(n) for n in names if (folder / n / checksums.NAME).is_file())
    return sorted(int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdigit())


def find_checkpoint(path: str | Path) -> Path:
    """Folder of one step: `path` itself, or the latest step of a workdir.

    Raises:
      InputError: there is none.
    """
    path = fetched(path) if is_hub(path) else place(path).absolute()
    for folder in (path / FOLDER, path):
        if steps := steps_in(folder):
            return folder / str(steps[-1])
    if (path / "state").is_dir() or (path / "config").is_dir():
        return path
    if path.is_file():
        raise InputError(
            f"{path} is a file: give a workdir or the folder of one step; weights of PyTorch "
            f"become one by ppflow convert --source={path.name} --target=DIR"
        )
    raise InputError(
        f"no checkpoint in {path}: expected a workdir with {FOLDER}/, or the folder of one step"
    )


def read_json(path: Path) -> dict[str, Any]:
    """What the checkpoint at `path` says about itself, of whatever kind it is.

    Raises:
      InputError: missing or unreadable.
    """
    with readable(path):
        if not checksums.file_is_good(path, CONFIG):
            raise ValueError(f"{CONFIG} is not as it was written: see {checksums.NAME}")
        return dict(json.loads((path / CONFIG).read_text()))


def _alone() -> ocp.options.MultiprocessingOptions:
    """For what one process reads or writes by itself: Orbax else waits for all of them."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )


def load_stored(path: Path, tree: Any) -> Any:
    """Those leaves of the state at `path` that `tree` has, in the dtypes they are stored in.

    Raises:
      InputError: damaged, unreadable, or not there.
    """
    verify(path)
    alone = _alone()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with readable(path), here(path) as folder:
        return ocp.Checkpointer(handler, multiprocessing_options=alone).restore(
            folder / "state",
            args=ocp.args.PyTreeRestore(
                tree,
                restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree),
                partial_restore=True,
            ),
        )


def stored_tree(path: Path) -> dict[str, Any]:
    """Shapes and dtypes of everything in the state at `path`; reads no array."""
    with readable(path):
        folder = copied(path) if isinstance(path, ObjectPath) else path
        return ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree


def check_new(target: str | Path) -> Path:
    """Absolute path of a folder or file to make, where nothing is yet.

    Raises:
      InputError: something is there, or it cannot be made.
    """
    target = place(target).absolute()
    if isinstance(target, ObjectPath):
        writable_directory(target)
        # What a killed command has left there: without checksums it does not count
        begun = (target / FOLDER, target / lease.FOLDER)
        others = (p for p in target.rglob("*") if not any(map(p.is_relative_to, begun)))
        if target.is_file() or steps_in(begun[0]) or any(True for _ in others):
            raise InputError(f"{target} exists: give a --target that does not, or remove it")
        return target
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise InputError(f"{target} exists: give a --target that does not, or remove it")
    parent = next(p for p in target.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {target} in {parent}: choose a folder where you may write")
    return target


def write_checkpoint(target: str | Path, state: Any, values: dict[str, Any]) -> None:
    """A checkpoint of step 0 in a new folder, which appears when it is complete.

    Beyond the NumPy arrays of `state` it needs about half of their memory: Orbax by default
    copies them, and then holds all of them again on the way to the disk.

    Raises:
      InputError: see `check_new`; the disk is full.
    """
    target = check_new(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    if isinstance(target, ObjectPath):
        partial = scratch(target.name)
    arrays = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, arrays), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    alone = _alone()
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, multiprocessing_options=alone
    )
    saved = ocp.args.PyTreeSave(
        state,
        save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=2**24), state),
        ocdbt_target_data_file_size=2**26,
    )
    try:
        (partial / FOLDER).mkdir(parents=True)
        config = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
        manager = ocp.CheckpointManager(
            partial / FOLDER,
            options=ocp.CheckpointManagerOptions(
                create=False, enable_async_checkpointing=False, multiprocessing_options=alone
            ),
            item_handlers={"state": handler, "config": config},
        )
        manager.save(0, args=ocp.args.Composite(state=saved, config=ocp.args.JsonSave(values)))
        manager.close()
        checksums.write(partial / FOLDER / "0", exempt=EXEMPT)
        if isinstance(target, ObjectPath):
            with locked(target):
                check_new(target)  # which another may have been faster to write
                (target / FOLDER).rmtree()
                upload_folder(partial / FOLDER / "0", target / FOLDER / "0", checksums.NAME)
            return
        os.replace(partial, target)  # an empty folder is replaced, any other is not
    except InputError:
        raise
    except Exception as e:  # TensorStore reports a full disk as a ValueError, among others
        raise InputError(f"cannot write {target} ({reason(e)}): is the disk full?") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
