"""A server between clients and an object store that fails on purpose.

with faulty(port_of_the_store) as faults:
    faults.share = 0.1      # of requests: 429, 503 or a connection that is cut, in turn
    faults.refuse = "quota" # or "permission": every request that writes is answered with 403
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_SAID = {
    "quota": ("quotaExceeded", "The storage quota of the project has been exceeded."),
    "permission": ("forbidden", "The caller does not have storage.objects.create access."),
}


class Faults:
    """What goes wrong, and how often it did."""

    def __init__(self, port: int, seed: int):
        self.port, self.share, self.refuse = port, 0.0, ""
        self.made: Counter = Counter()
        self._random, self._lock = random.Random(seed), threading.Lock()

    def next(self) -> str:
        """`429`, `503`, `reset` or nothing."""
        with self._lock:
            if self._random.random() >= self.share:
                return ""
            found = self._random.choice(["429", "503", "reset"])
            self.made[found] += 1
            return found


@contextlib.contextmanager
def faulty(store: int, port: int, seed: int = 0) -> Iterator[Faults]:
    """Between clients at `port` and the store at port `store`."""
    faults = Faults(store, seed)
    server = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"f": faults}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield faults
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients go away in the middle: gcsfs does when another answer is enough."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    f: Faults

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.f.refuse and self.command in ("POST", "PUT"):
            reason, message = _SAID[self.f.refuse]
            error = {"code": 403, "message": message, "errors": [{"reason": reason}]}
            self._answer(403, {}, json.dumps({"error": error}).encode())
            return
        fault = self.f.next()
        if fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.close()
            return
        if fault:
            error = {"code": int(fault), "message": "rate limit, on purpose"}
            self._answer(int(fault), {}, json.dumps({"error": error}).encode())
            return
        store = http.client.HTTPConnection("127.0.0.1", self.f.port, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "accept-encoding"}
        store.request(self.command, self.path, body, headers)
        answer = store.getresponse()
        data = answer.read()
        kept = {k: v for k, v in answer.getheaders() if k.lower() not in _HOP}
        self._answer(answer.status, kept, data)
        store.close()

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _pass

    def log_message(self, format: str, *args: object) -> None:
        pass


_HOP = {"content-length", "transfer-encoding", "connection"}
