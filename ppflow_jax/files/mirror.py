"""A folder of an object store, of which some files are copied to this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ppflow_jax.files.copies import AT_ONCE
from ppflow_jax.files.disk import atomic, check_room, writable_directory
from ppflow_jax.files.objects import ask
from ppflow_jax.files.place import ObjectPath
from ppflow_jax.files.scratch import scratch


class Mirror:
    """The objects below `root`, as they are when it is made.

    Attributes:
      names: their paths from `root`, in order; hidden ones are left out.

    Args:
      stage: folder in which copies are kept for later runs, as long as the store has the same
        objects; empty: they go when the process ends.

    Raises:
      OSError: see `objects.ask`.
    """

    def __init__(self, root: ObjectPath, stage: str = ""):
        self.root, self._stage = root, stage
        found = ask(str(root), lambda system: system.find(str(root), detail=True))
        start = len(str(root).partition("://")[2].rstrip("/")) + 1
        kept = {name[start:]: info for name, info in found.items() if len(name) > start}
        self._infos = {
            name: kept[name]
            for name in sorted(kept)
            if not any(part.startswith(".") for part in name.split("/"))
        }
        self.names = tuple(self._infos)

    def fetch(self, names: Iterable[str]) -> Path:
        """The folder on this machine that stands for `root`, with these files in it.

        Every one is compared with the digest that the store has of it when it is copied; one that
        was kept, by its size.

        Raises:
          OSError: see `objects.ask`; no room.
          InputError: the folder for copies cannot be written to.
        """
        sizes = {name: int(self._infos[name]["size"] or 0) for name in names}
        if self._stage:
            target = writable_directory(Path(self._stage) / self._version(sizes))
        else:
            target = scratch(self.root.name)
            target.mkdir()
        missing = [name for name in sizes if not _has(target / name, sizes[name])]
        check_room(target, sum(sizes[name] for name in missing), f"copies of {self.root}")

        def copy(name: str) -> None:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            with atomic(target / name) as temporary:
                (self.root / name).download(temporary)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(copy, missing):
                pass
        return target

    def _version(self, names: Iterable[str]) -> str:
        """A name for these objects with the contents that they have now."""
        digest = hashlib.sha256(str(self.root).encode())
        for name in sorted(names):
            info = self._infos[name]
            tag = info.get("md5Hash") or info.get("ETag") or info.get("etag")
            digest.update(f"\0{name}\0{info['size']}\0{tag}".encode())
        return digest.hexdigest()[:16]


def _has(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False
