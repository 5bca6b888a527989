"""Picture files below a folder or in a .zip: what every command takes for a picture, and its class.

Hidden entries are ignored, every real directory is read once, and what is left out is counted.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from ppflow_jax.errors import InputError
from ppflow_jax.files.copies import local_file
from ppflow_jax.files.place import ObjectPath, place

EXTENSIONS = tuple(
    ".bmp .gif .jfif .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)
DATASET = "dataset.json"  # labels, as the EDM and StyleGAN tools pack them
CARD = "card.json"  # of a folder that `sample` made
LARGEST_FILE = 2**29  # bytes
_SYSTEM = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}


def hidden(name: str) -> bool:
    """Whether an entry is a system's or a tool's own: `.ipynb_checkpoints`, `._x.png`, ..."""
    return name.startswith(".") or name in _SYSTEM


@dataclass(frozen=True)
class ImageTree:
    """The pictures below `root`, a folder or a .zip.

    Attributes:
      name: as the user wrote it, for messages.
      files: relative paths of the pictures, by directory and then by name.
      others: relative paths of all other files that are not hidden.
      directories: names of the directories in `root`.
      left_out: number of entries that were not read, by what they are.
      strip: leading directory of a .zip that holds everything else, or "".
    """

    name: str
    root: Path
    files: tuple[str, ...]
    others: frozenset[str]
    directories: tuple[str, ...]
    left_out: Counter = field(default_factory=Counter)
    strip: str = ""

    @property
    def zipped(self) -> bool:
        return not isinstance(self.root, ObjectPath) and self.root.is_file()

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.root)

    def __getstate__(self) -> dict:
        """Worker processes open the archive themselves."""
        return {k: v for k, v in self.__dict__.items() if k != "_archive"}

    def read(self, file: str) -> bytes:
        """Content of one file.

        Raises:
          OSError, zipfile.BadZipFile, RuntimeError, ValueError: it cannot be read or is too large.
        """
        if self.zipped:
            member = self.strip + file
            size = self._archive.getinfo(member).file_size
        elif isinstance(self.root, ObjectPath):  # measured when it is there: asking takes long
            data = (self.root / file).read_bytes()
            size = len(data)
        else:
            size = (self.root / file).stat().st_size
        if size > LARGEST_FILE:
            raise ValueError(f"{size:,} bytes, more than the {LARGEST_FILE:,} of any picture here")
        if isinstance(self.root, ObjectPath):
            return data
        return self._archive.read(member) if self.zipped else (self.root / file).read_bytes()

    def notes(self) -> list[str]:
        """What was left out, one line or none."""
        if not self.left_out:
            return []
        said = ", ".join(f"{n:,} {what}" for what, n in sorted(self.left_out.items()))
        return [f"{self.name}: left out {said}"]


def open_tree(path: str) -> ImageTree:
    """Find all pictures below a folder or in a .zip; reads no picture.

    Raises:
      InputError: not there, not readable, or neither of the two.
    """
    root = place(path).absolute()
    if isinstance(root, ObjectPath):
        return _store_tree(path, root)
    if root.is_file():
        return _zip_tree(path, root)
    walk = _Walk(root)
    try:
        walk.run()
    except OSError as e:
        where = f" at {e.filename}" if e.filename and Path(e.filename) != root else ""
        raise InputError(
            f"cannot read {path} ({e.strerror}{where}): give a folder or .zip of pictures"
        ) from e
    return _tree(path, root, walk.found, sorted(walk.directories), walk.left_out)


def _store_tree(name: str, root: ObjectPath) -> ImageTree:
    """Of a folder in an object store, or of a .zip there, which is copied to this machine."""
    try:
        if root.is_file():
            return _zip_tree(name, local_file(root))
        paths = [str(path.relative_to(root)) for path in root.rglob("*")]
    except OSError as e:
        raise InputError(f"cannot read {name} ({e.strerror})") from e
    if not paths:
        raise InputError(f"cannot read {name} (not found): give a folder or .zip of pictures")
    found = [path for path in paths if not any(map(hidden, path.split("/")))]
    left_out: Counter = Counter()
    if len(found) < len(paths):
        left_out["hidden entries"] = len(paths) - len(found)
    directories = sorted({path.partition("/")[0] for path in found if "/" in path})
    return _tree(name, root, found, directories, left_out)


def _tree(
    name: str,
    root: Path,
    found: list[str],
    directories: list[str],
    left_out: Counter,
    strip: str = "",
) -> ImageTree:
    pictures, others = [], []
    for file in found:
        (pictures if file.lower().endswith(EXTENSIONS) else others).append(file)
    for file in others:
        if PurePosixPath(file).name not in (DATASET, CARD):
            suffix = PurePosixPath(file).suffix.lower()
            left_out[f"{suffix} files" if suffix else "files without extension"] += 1
    pictures.sort(key=_order)
    return ImageTree(
        name, root, tuple(pictures), frozenset(others), tuple(directories), left_out, strip
    )


def _order(file: str) -> tuple[str, str, str]:
    """Sort key: class directory, directory, name."""
    folder, _, name = file.rpartition("/")
    return folder.partition("/")[0], folder, name


class _Walk:
    """All files below a folder: directories first as they are, then those behind links."""

    def __init__(self, root: Path):
        self.root = root
        self.found: list[str] = []
        self.directories: set[str] = set()
        self.left_out: Counter = Counter()
        self._seen: set[tuple[int, int]] = set()
        self._links: list[str] = []  # to directories

    def run(self) -> None:
        self._below("")
        real = Path(os.path.realpath(self.root))
        while self._links:
            link = min(self._links)
            self._links.remove(link)
            target = Path(os.path.realpath(self.root / link))
            if real.is_relative_to(target) or self._key(target) in self._seen:
                self.left_out["links to directories that are read already"] += 1
                continue
            if "/" not in link:
                self.directories.add(link)
            self._below(link)

    @staticmethod
    def _key(path: Path) -> tuple[int, int]:
        info = path.stat()
        return info.st_dev, info.st_ino

    def _below(self, top: str) -> None:
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            here = self.root / folder
            if (key := self._key(here)) in self._seen:
                continue
            self._seen.add(key)
            with os.scandir(here) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if hidden(entry.name):
                        self.left_out["hidden entries"] += 1
                    elif entry.is_dir(follow_symlinks=False):
                        waiting.append(path)
                        if not folder:
                            self.directories.add(entry.name)
                    else:
                        self._other(entry, path)

    def _other(self, entry: os.DirEntry, path: str) -> None:
        """A file or a link; one that leads nowhere is kept, for reading it says so by name."""
        try:
            mode = os.stat(entry.path).st_mode
        except OSError:
            self.found.append(path)
            return
        if stat.S_ISDIR(mode):
            self._links.append(path)
        elif stat.S_ISREG(mode):
            self.found.append(path)
        else:
            self.left_out["pipes, sockets or devices"] += 1


def _zip_tree(name: str, root: Path) -> ImageTree:
    try:
        with zipfile.ZipFile(root) as archive:
            members = [m for m in archive.namelist() if not m.endswith("/")]
    except (OSError, zipfile.BadZipFile, ValueError) as e:
        raise InputError(
            f"cannot read {name} ({e}): give a folder of pictures, or a .zip of one"
        ) from e
    if twice := [m for m, n in Counter(members).items() if n > 1]:
        raise InputError(f"{name} has two members {twice[0]}: pack it again")
    left_out: Counter = Counter()
    found = []
    for member in members:
        if any(map(hidden, member.split("/"))):
            left_out["hidden entries"] += 1
        else:
            found.append(member)
    # Zipping a folder puts its name before everything
    strip = ""
    tops = {member.partition("/")[0] for member in found}
    if len(tops) == 1 and all(member.count("/") > 1 or _is_card(member) for member in found):
        strip = f"{tops.pop()}/"
        found = [member.removeprefix(strip) for member in found]
    directories = sorted({file.partition("/")[0] for file in found if "/" in file})
    return _tree(name, root, found, directories, left_out, strip)


def _is_card(member: str) -> bool:
    return PurePosixPath(member).name in (DATASET, CARD)
