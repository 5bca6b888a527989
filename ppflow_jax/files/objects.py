"""Requests to object stores: asked again where that helps, else one clear error.

A request is asked again when the store is busy (429, 503, other 5xx), does not answer or cuts the
connection, with growing pauses, `TRIES` times. Every one of them is counted; how many there were is
said the first time and at the end of the command. Everything else becomes an `OSError` whose words
say what to do.

Nothing here is used for local paths, and nothing is imported for them.
"""

from __future__ import annotations

import atexit
import errno
import functools
import importlib.util
import logging
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ppflow_jax.errors import EXTRAS, InputError

TRIES = 8
PAUSE = 0.5  # seconds before the second try; it doubles, up to LONGEST
LONGEST = 16.0
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # file systems of fsspec
_BUSY = {408, 409, 429, 500, 502, 503, 504}
_QUOTA = re.compile(r"quota|storage.?full|insufficient.?storage", re.I)
_RATE = re.compile(r"rate|per minute|per second|reduce", re.I)  # a quota that is good again soon

Answer = TypeVar("Answer")


class StoreError(OSError):
    """A store that refuses, or does not answer; `strerror` says what to do."""


class Damaged(StoreError):
    """What was read is not what was written."""


class Retries:
    """How often requests were asked again in this process."""

    def __init__(self) -> None:
        self.count, self.last = 0, ""
        self._lock = threading.Lock()

    def add(self, why: str) -> None:
        with self._lock:
            self.count, self.last = self.count + 1, why
            first = self.count == 1
        if first:
            print(f"the object store does not answer ({why}): asking again", file=sys.stderr)
            atexit.register(self.say)

    def say(self) -> None:
        """The number, on stderr."""
        times = "time" if self.count == 1 else "times"
        print(
            f"asked the object store again {self.count} {times} (last: {self.last})",
            file=sys.stderr,
        )


RETRIES = Retries()


def scheme_of(url: str) -> str:
    """`gs` or `s3`."""
    return url.partition("://")[0]


def filesystem(scheme: str) -> Any:
    """The file system of fsspec for a scheme; listings are never remembered.

    Credentials and addresses are those of the cloud's own tools, and of fsspec's configuration
    (`AWS_ENDPOINT_URL`, `FSSPEC_GCS_TOKEN`, ...).

    Raises:
      InputError: its package is not installed.
    """
    return _filesystem(scheme, os.getpid())


@functools.cache
def _filesystem(scheme: str, process: int) -> Any:
    package = _PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        extra = EXTRAS[scheme]
        raise InputError(
            f"{scheme}:// needs {package}, which is not installed: pip install "
            f"'ppflow_jax[{extra}]'"
        )
    import fsspec

    # Orbax's file systems too: other processes write what these list
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    if scheme == "gs":
        made = fsspec.filesystem("gcs", use_listings_cache=False, consistency="md5")
    else:  # its own retries are not counted, ours are
        own = {"config_kwargs": {"retries": {"max_attempts": 0}}}
        made = fsspec.filesystem("s3", use_listings_cache=False, **own)
        made.retries = 1
    _count_retries_of_gcsfs(logging.getLogger("gcsfs"))
    return made


@functools.cache
def _count_retries_of_gcsfs(logger: logging.Logger) -> None:
    """gcsfs asks again by itself and says so in its log alone, where errors have a traceback."""

    def passes(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "retrying after exception" in text:
            RETRIES.add(text.partition("exception: ")[2] or "no answer")
        return record.levelno >= logging.WARNING and not record.exc_info

    logger.setLevel(logging.DEBUG)
    logger.addFilter(passes)


def ask(url: str, request: Callable[[Any], Answer], missing: str = "not found") -> Answer:
    """`request` of the file system of `url`, asked again where that helps.

    Args:
      missing: what it means that something is not there.

    Raises:
      FileNotFoundError, FileExistsError: as the store says.
      StoreError: its errno is EACCES without permission or credentials, EDQUOT where a quota is
        full, EIO where the store does not answer.
      InputError: see `filesystem`.
    """
    system = filesystem(scheme_of(url))
    for attempt in range(1, TRIES + 1):
        try:
            return request(system)
        except (FileExistsError, InputError):
            raise
        except FileNotFoundError as e:
            raise FileNotFoundError(errno.ENOENT, missing, url) from e
        except Exception as e:  # of gcsfs, s3fs, aiohttp, botocore, google.auth
            found = _meaning(e, url)
            if found is not None:
                raise found from e
            if attempt == TRIES:
                raise StoreError(
                    errno.EIO, f"the object store does not answer: {_words(e)}", url
                ) from e
            RETRIES.add(_words(e))
            time.sleep(min(LONGEST, PAUSE * 2 ** (attempt - 1)) * (0.5 + random.random()))
    raise AssertionError("unreachable")


def _meaning(error: Exception, url: str) -> StoreError | None:
    """What an error is, in the words of this module; None if it is worth asking again."""
    code, text = _code(error), _words(error)
    kind = type(error).__name__
    if _QUOTA.search(text) and (code not in (429, 503) or not _RATE.search(text)):
        return StoreError(errno.EDQUOT, f"the quota of the object store is full: {text}", url)
    if kind in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"):
        tool = "gcloud auth application-default login" if url[0] == "g" else "aws configure"
        return StoreError(errno.EACCES, f"no credentials: {tool}", url)
    if isinstance(error, PermissionError) or code in (401, 403) or "Forbidden" in text:
        return StoreError(errno.EACCES, f"no permission: {text}", url)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return StoreError(error.errno, f"{error.strerror} on this machine", url)
    if code in _BUSY or (code is None and _no_answer(error)):
        return None
    if isinstance(error, OSError) and error.errno in (errno.EBUSY, errno.EREMOTEIO):
        return None
    return StoreError(errno.EIO, text or kind, url)


def _no_answer(error: Exception) -> bool:
    """Whether the connection failed, and not what was asked."""
    modules = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return (
        bool(modules & {"aiohttp", "requests", "botocore", "urllib3", "asyncio"})
        or isinstance(error, (ConnectionError, TimeoutError))
        or type(error).__name__ in ("FSTimeoutError", "ChecksumError")
    )


def _code(error: BaseException) -> int | None:
    """The HTTP status of an error, or of the one that it was made from."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for name in ("code", "status"):
        value = str(getattr(error, name, None))
        if value.isdigit():
            return int(value)
    return None if error.__cause__ is None else _code(error.__cause__)


def _words(error: BaseException) -> str:
    """What an error says, on one line; never a header or a token."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200]
