"""A folder on this machine for what passes between it and an object store.

It lies in the system's temporary folder (`TMPDIR` moves it) and goes when the process ends. One
that a killed process left is removed by the next.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "ppflow_jax"
_numbers = itertools.count()


def scratch(name: str = "") -> Path:
    """A new path in the folder, at which nothing is yet; `name` is its last part."""
    folder = _folder(os.getpid()) / f"{next(_numbers)}"
    folder.mkdir()
    return folder / (name or "files")


@functools.cache
def _folder(process: int) -> Path:
    owner = f"{_PREFIX}.{os.getuid()}."
    for left in Path(tempfile.gettempdir()).glob(f"{owner}*"):
        number = left.name[len(owner) :].partition(".")[0]
        if number.isdigit() and not _alive(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=f"{owner}{process}."))
    atexit.register(_remove, made, process)
    return made


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not in a fork
        shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
