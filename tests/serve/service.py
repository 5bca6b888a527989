"""A service in a thread, and its raw sockets."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from ppflow_jax.serve.batcher import Batcher
from ppflow_jax.serve.device import Device, Way
from ppflow_jax.serve.server import Server, bind

FAST = {"steps": 4, "solver": "euler", "guidance": [1, 2]}  # of most requests here


def batcher_of(model, most: int = 256) -> Batcher:
    """With microbatches of 2 on each of 8 devices."""
    return Batcher(Device(model, "none", 2), most)


@contextlib.contextmanager
def running(batcher: Batcher, first: Way | None = None) -> Iterator[int]:
    """The port of a server that is ready; it is stopped as by a signal.

    Args:
      first: what is compiled first, in place of the plan of 50 steps.
    """
    server, ready = Server(batcher), threading.Event()
    if first is not None:
        server.service.first_way = lambda: first
    bound = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_on, args=(bound, ready.set))
    thread.start()
    assert ready.wait(60)
    try:
        yield bound.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()
    assert not thread.is_alive()


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.content.splitlines()]


class Client:
    """A connection for every request."""

    def __init__(self, port: int):
        self.port = port

    def get(self, path: str) -> Reply:
        return self._ask("GET", path)

    def post(self, path: str, values: Any, accept: str = "*/*") -> Reply:
        headers = {"content-type": "application/json", "accept": accept}
        return self._ask("POST", path, json.dumps(values), headers)

    def _ask(self, *request: Any) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(*request)
            reply = connection.getresponse()
            names = {name.lower(): value for name, value in reply.getheaders()}
            return Reply(reply.status, names, reply.read())


def post(path: str, body: bytes, *headers: str) -> bytes:
    """The bytes of a request that closes its connection."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: x",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def exchange(port: int, data: bytes, seconds: float = 20) -> bytes:
    """All that a server answers until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        with contextlib.suppress(ConnectionError):  # it may close before all is sent
            connection.sendall(data)
        return everything(connection)


def everything(connection: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            found += piece
    return found


def status_of(reply: bytes) -> int:
    """0 for a connection that was closed without a word."""
    return int(reply.split()[1]) if reply else 0


def error_of(reply: bytes) -> str:
    return json.loads(reply.partition(b"\r\n\r\n")[2])["error"]


def until(what, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)
