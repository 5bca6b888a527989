"""Forty clients that mean no good: each gets an answer or is let go, and the service stays up."""

from __future__ import annotations

import contextlib
import json
import socket
import time

import pytest

from ppflow_jax.serve import replies, server
from ppflow_jax.serve.device import Way
from tests.serve.service import (
    Client,
    batcher_of,
    error_of,
    everything,
    exchange,
    post,
    running,
    status_of,
    until,
)

GOOD = {"label": 1, "seed": 1, "steps": 4, "solver": "euler"}
NEVER = json.dumps(GOOD).encode()


@pytest.fixture(scope="module")
def batcher(model):
    return batcher_of(model)


@pytest.fixture(scope="module")
def port(model, batcher):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replies, "BODY_SECONDS", 0.5)
        patch.setattr(server, "HEAD_SECONDS", 0.5)
        patch.setattr(server, "TAKE_SECONDS", 0.5)
        with running(batcher, Way(model.plan(steps=4, solver="euler"))) as port:
            yield port


def changed(**values) -> bytes:
    return json.dumps(GOOD | values).encode()


BODIES = [
    (b"", "no JSON"),
    (b"{", "no JSON"),
    (b'{"label": 1,}', "no JSON"),
    (b"\xff\xfe\x00", "no JSON"),
    (b"[1, 2]", "must be an object"),
    (b"null", "must be an object"),
    (b"{}", "label is missing"),
    (b"[" * 16_000, "no JSON|nested too deeply"),
    (b'{"label": ' * 1400 + b"1" + b"}" * 1400, "nested too deeply|give a class"),
    (b'{"label": NaN}', "NaN is no number"),
    (b'{"label": 1, "guidance": -Infinity}', "no number"),
    (b'{"label": 1, "guidance": 1e999}', "from -100 to 100"),
    (b'{"label": 1, "seed": ' + b"9" * 9000 + b"}", "no JSON"),
    (b'{"label": "\\ud800"}', "no class is called"),
    (changed(label=-1), "from 0 to 9"),
    (changed(label=11), "from 0 to 9"),
    (changed(label=1.5), "from 0 to 9"),
    (changed(label=True), "from 0 to 9"),
    (changed(label=None), "from 0 to 9"),
    (changed(label="balanced"), "no class is called"),
    (changed(label="x" * 9000), "no class is called"),
    (changed(seed=-1), "seed=-1"),
    (changed(seed=2**32), "whole number from 0 to"),
    (changed(seed="1"), "whole number"),
    (changed(seed=[[1] * 5000]), "seed=a list"),
    (changed(steps=0), "from 1 to 250"),
    (changed(steps=1), "at least 2"),
    (changed(steps=10**9), "from 1 to 250"),
    (changed(steps=4.0), "from 1 to 250"),
    (changed(n=0), "from 1 to 16"),
    (changed(n=10**6), "from 1 to 16"),
    (changed(n=2), "Accept: application/json"),
    (changed(guidance=[1, 2, 3]), "3 scales"),
    (changed(guidance=[]), "0 scales"),
    (changed(guidance="high"), "from -100 to 100"),
    (changed(guidance=10**300), "from -100 to 100"),
    (changed(guidance=[1, None]), "from -100 to 100"),
    (changed(solver="sde-heun"), "one of heun, euler"),
    (changed(solver=["heun"]), "one of heun, euler"),
    (changed(preset="merge_ratio=0.5"), "one of exact"),
    (changed(decode="vae:/etc"), "no field"),
]


@pytest.mark.parametrize(("body", "words"), BODIES)
def test_wrong_bodies_get_a_line(port, body, words):
    reply = exchange(port, post("/v1/images", body))
    assert status_of(reply) == 400 and b"Traceback" not in reply
    error = error_of(reply)
    assert any(word in error for word in words.split("|")) and "\n" not in error, error
    assert len(error) < 300


REQUESTS = [
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
    (b"\x00" * 100_000, 400),
    (b"GET / HTTP/9.9\r\nConnection: close\r\n\r\n", 200),
    (b"GET / HTTP/nine\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", 400),  # no host
    (b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
    (b"GET /%00%ff HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
    (b"GET /" + b"a" * 50_000 + b" HTTP/1.1\r\nConnection: close\r\nHost: x\r\n\r\n", 404),
    (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 50_000 + b"\r\n", 400),
    (b"DELETE /v1/images HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
    (b"GET /v1/images HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
    (post("/v1/images", NEVER).replace(b"application/json", b"text/plain"), 415),
    (post("/v1/images", b'{"label": "' + b"x" * 10_000_000 + b'"}'), 413),
    (post("/v1/images", b"", "Content-Length: 7"), 400),  # two lengths
    (post("/v1/images", b"").replace(b"Length: 0", b"Length: -5"), 400),
    (post("/v1/images", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: x"), 400),
    (
        post("/v1/images", b"zz\r\n").replace(b"Content-Length: 4", b"Transfer-Encoding: chunked"),
        400,
    ),
    # silent, and slow
    (b"", 0),
    (b"GET / HT", 0),
    (post("/v1/images", NEVER)[:-10], 408),
    (post("/v1/stages", NEVER)[: -len(NEVER)], 408),
]


@pytest.mark.parametrize(("data", "status"), REQUESTS)
def test_wrong_requests_are_answered_or_let_go(port, data, status):
    start = time.monotonic()
    reply = exchange(port, data)
    # What comes in pieces may be refused, or reset, before its end.
    assert status_of(reply) in ({status, 400, 0} if len(data) > 40_000 else {status})
    assert b"Traceback" not in reply and time.monotonic() - start < 5


def test_a_head_that_drips_is_not_waited_for(port):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in post("/v1/images", NEVER):
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
        assert everything(connection) == b"" and time.monotonic() - start < 5


@pytest.mark.parametrize("path", ["/v1/images", "/v1/stages"])
def test_who_goes_away_leaves_no_work(port, batcher, monkeypatch, path):
    device, run = batcher.device, batcher.device.run
    with monkeypatch.context() as patch:
        patch.setattr(device, "run", lambda way, rows: time.sleep(5) or run(way, rows))
        connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        for connection in connections:
            connection.sendall(post(path, NEVER))
        until(lambda: batcher.waiting >= 20)
        for number, connection in enumerate(connections):
            if number % 2:
                connection.shutdown(socket.SHUT_WR)  # half-closed
            else:
                connection.close()
        until(lambda: batcher.waiting == 0, 4.5)  # before the microbatch under way is done
        for connection in connections:
            connection.close()


def test_replies_that_nobody_takes_are_dropped(port):
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.settimeout(10)
        asked = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(2000):
                connection.sendall(asked)
        until = time.monotonic() + 60
        with pytest.raises(ConnectionError):
            while time.monotonic() < until:
                connection.sendall(asked)
                time.sleep(0.01)


def test_and_the_service_is_up(port):
    client = Client(port)
    assert client.get("/health").status == 200
    assert client.post("/v1/images", GOOD).status == 200
    assert client.post("/v1/stages", GOOD).status == 200
    assert 'status="500"' not in client.get("/metrics").content.decode()
