"""The Hugging Face hub: `hf:OWNER/REPO[/FILE][@REVISION]`, wherever weights are read, and datasets.

A file, or of a repository without one what is found in it: a checkpoint that `ppflow push` made,
else its safetensors, else its only file of PyTorch. They are kept in the hub's own cache, and every
file is compared with the digest that the hub has of it whenever it is opened. A token is found by
huggingface_hub itself (`hf auth login`, HF_TOKEN); it is never seen here.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ppflow_jax.errors import HUB, InputError
from ppflow_jax.files.checksums import NAME as SUMS

_ADDRESS = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+?))?(?:@(?P<revision>[\w./-]+))?"
)
_ENDINGS = (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin", ".pt", ".pth")
_CONFIG = "config.json"  # of an autoencoder, beside its weights


@dataclass(frozen=True)
class Address:
    """A repository of the hub, perhaps a file or folder of it, at a branch, tag or commit."""

    repo: str
    file: str
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> Address:
        """
        Raises:
          InputError: not of the form above.
        """
        found = _ADDRESS.fullmatch(text)
        if not found or ".." in (found["file"] or "").split("/"):
            raise InputError(f"{text}: write hf:OWNER/REPO, hf:OWNER/REPO/FILE or either @REVISION")
        return cls(found["repo"], (found["file"] or "").strip("/"), found["revision"])

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return f"{HUB}{self.repo}{file}" + (f"@{self.revision}" if self.revision else "")


def is_hub(path: str | Path) -> bool:
    """Whether it is an address on the hub."""
    return isinstance(path, str) and path.startswith(HUB)


def api() -> Any:
    """The package huggingface_hub.

    Raises:
      InputError: it is not installed.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError(
            f"{HUB} needs huggingface_hub, which is not installed: pip install 'ppflow_jax[hub]'"
        )
    import huggingface_hub

    return huggingface_hub


@functools.cache
def fetched(text: str) -> Path:
    """The file or folder that `text` names, on this machine; what it is goes to stderr.

    Raises:
      InputError: not there, not to be read, damaged, or a repository without weights.
    """
    address, hub = Address.parse(text), api()
    with one_line(text):
        client = hub.HfApi()
        info = client.model_info(address.repo, revision=address.revision)
        entries = _entries(client, address.repo, info.sha, "model")
        wanted, opened = _chosen(address, entries)
    folder = _downloaded(text, info.sha, {name: entries[name] for name in wanted}, "model")
    path = folder / opened if opened else folder
    said = f"SHA-256 {_sha256(path)[:16]}" if path.is_file() else f"{len(wanted)} files"
    print(
        f"{HUB}{address.repo}@{info.sha[:12]} {opened or 'checkpoint'}: {said}, as the hub has it",
        file=sys.stderr,
    )
    return path


class Dataset:
    """A dataset `hf:OWNER/REPO[/FOLDER][@REVISION]`, at one commit; `str` names it with that.

    Attributes:
      names: of its files, from FOLDER on.

    Raises:
      InputError: not there, or not to be read.
    """

    def __init__(self, text: str):
        self._text, address, hub = text, Address.parse(text), api()
        with one_line(text):
            client = hub.HfApi()
            info = client.dataset_info(address.repo, revision=address.revision)
            entries = _entries(client, address.repo, info.sha, "dataset")
        self._address = replace(address, revision=info.sha)
        self._below = f"{address.file}/" if address.file else ""
        self._entries = {
            name: e for name, e in sorted(entries.items()) if name.startswith(self._below)
        }
        self.names = tuple(name[len(self._below) :] for name in self._entries)

    def __str__(self) -> str:
        return str(self._address)

    def fetch(self, names: list[str]) -> Path:
        """FOLDER on this machine with these files, each compared with what the hub says of it.

        Raises:
          InputError: one is damaged, or the hub does not answer.
        """
        wanted = {self._below + name: self._entries[self._below + name] for name in names}
        return _downloaded(self._text, self._address.revision, wanted, "dataset") / self._below


def _entries(client: Any, repo: str, commit: str, kind: str) -> dict[str, Any]:
    """What the hub says of all files of a repository."""
    listed = client.list_repo_tree(repo, recursive=True, revision=commit, repo_type=kind)
    return {entry.path: entry for entry in listed if hasattr(entry, "blob_id")}  # folders have none


def _downloaded(text: str, commit: str, wanted: dict[str, Any], kind: str) -> Path:
    """The folder in the hub's cache that has the files `wanted`, all compared.

    Raises:
      InputError: one is damaged, or the hub does not answer.
    """
    repo, patterns = Address.parse(text).repo, [_literal(name) for name in wanted]
    given = dict(revision=commit, repo_type=kind, allow_patterns=patterns)
    with one_line(text):
        folder = Path(api().HfApi().snapshot_download(repo, **given))

    def whole(name: str) -> bool:
        return (folder / name).is_file() and _as_the_hub_says(folder / name, wanted[name])

    with ThreadPoolExecutor() as pool:
        for name, good in zip(wanted, pool.map(whole, wanted)):
            if not good:
                raise InputError(
                    f"{text}: {name} is not what the hub has: remove {folder}, and load it again"
                )
    return folder


def _chosen(address: Address, entries: dict[str, Any]) -> tuple[list[str], str]:
    """Files to load, and the one (or the folder, "" is the whole) to open.

    Raises:
      InputError: none, or several of which none is to be preferred.
    """
    below = f"{address.file}/" if address.file else ""
    if address.file in entries:
        return _with_others(address.file, entries), address.file
    inside = [name for name in entries if name.startswith(below)]
    if not inside:
        raise InputError(
            f"{address}: there is no {address.file} in {address.repo}, which has "
            f"{', '.join(sorted(entries)[:8]) or 'nothing'}"
        )
    if any(name.endswith(f"/{SUMS}") for name in inside):
        kept = ("checkpoints/", "state/", "config/", SUMS, "plan.json")
        return [n for n in inside if n[len(below) :].startswith(kept)], address.file
    top = [name for name in inside if "/" not in name[len(below) :]]
    for ending in _ENDINGS:
        found = [name for name in top if name.endswith(ending)]
        if len(found) > 1:
            raise InputError(f"{address} has several files of weights: give one of {_list(found)}")
        if found:
            return _with_others(found[0], entries), found[0]
    raise InputError(f"{address} has no weights among {_list(sorted(top))}: give a file of it")


def _with_others(name: str, entries: dict[str, Any]) -> list[str]:
    """A file, those that an index is of, and the config.json beside it."""
    folder = name.rpartition("/")[0]
    beside = [n for n in entries if n.rpartition("/")[0] == folder]
    kept = [n for n in beside if n.rpartition("/")[2] == _CONFIG]
    if name.endswith(".index.json"):
        kept += [n for n in beside if n.endswith(name.split(".")[-3])]
    return [name, *(n for n in kept if n != name)]


def _list(names: list[str]) -> str:
    return ", ".join(names[:8])


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _as_the_hub_says(file: Path, entry: Any) -> bool:
    """SHA-256 of large files, and of others what git calls them."""
    if entry.lfs is not None:
        return _sha256(file) == entry.lfs.sha256
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == entry.blob_id


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def one_line(text: str) -> Iterator[None]:
    """Turn what the hub says in the block into one line about `text`, without headers or tokens."""
    api()
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as e:
        raise InputError(f"{text} asks for an agreement: give it on its page, then log in") from e
    except errors.RepositoryNotFoundError as e:
        raise InputError(
            f"{text}: no such repository, or a private one: see its name, or log in by hf auth "
            "login or HF_TOKEN"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise InputError(f"{text}: no such revision: give a branch, tag or commit") from e
    except errors.HFValidationError as e:
        raise InputError(f"{text}: {str(e).splitlines()[0]}") from e
    except errors.HfHubHTTPError as e:
        code = getattr(e.response, "status_code", "no answer")
        asks = code in (401, 403)
        do = "log in with a token that may do this" if asks else "try again later"
        raise InputError(f"{text}: the hub answers {code}: {do}") from e
    except InputError:
        raise
    except Exception as e:  # connections fail with the errors of several packages
        name = type(e).__name__
        if isinstance(e, OSError) or type(e).__module__.partition(".")[0].startswith("http"):
            raise InputError(f"{text}: the hub cannot be reached ({name}): try again later") from e
        raise
