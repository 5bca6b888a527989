"""The process: its address, its patience with clients, its end."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ppflow_jax.errors import InputError, RunError
from ppflow_jax.generate.plan_file import PlanFile
from ppflow_jax.serve.app import Service
from ppflow_jax.serve.batcher import Batcher

HEAD_SECONDS = 10  # for a client to send the head of a request
TAKE_SECONDS = 30  # for a client to take a piece of its reply
IDLE_SECONDS = 30  # between two requests of a connection
MOST_HEAD = 16_384  # bytes
MOST_CONNECTIONS = 512


class Protocol(H11Protocol):
    """HTTP with an end to the patience with clients that send or take their bytes too slowly."""

    _late: asyncio.TimerHandle | None = None  # for the head of a request
    _stuck: asyncio.TimerHandle | None = None  # with a reply

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._late, self._stuck):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._abort_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None and not self.transport.is_closing():
            self._stuck.cancel()
            self._stuck = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_later()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._abort_later()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._abort_later()

    def _watch(self) -> None:
        """Of a request that has begun to come, or the first: the timer is not set anew by bytes."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self._late is not None:
                self._late.cancel()
                self._late = None
        elif self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

    def _abort_later(self) -> None:
        """A transport that closes still waits for its client to take what was written."""
        if self._stuck is None:
            self._stuck = self.loop.call_later(TAKE_SECONDS, self.transport.abort)


class Server(uvicorn.Server):
    """A service on a socket. SIGTERM or Ctrl-C ends it when all that was asked for is answered."""

    def __init__(self, batcher: Batcher, tuned: PlanFile | None = None):
        self.batcher, self.service = batcher, Service(batcher, tuned)
        config = uvicorn.Config(
            self.service.app(),
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MOST_CONNECTIONS,
            h11_max_incomplete_event_size=MOST_HEAD,
            timeout_keep_alive=IDLE_SECONDS,
        )
        super().__init__(config)

    def serve_on(self, bound: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
        """Until a signal comes; `ready` is called when the first plan is compiled.

        Raises:
          RunError: it cannot be compiled.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():
            # uvicorn raises the signals again that it has caught, when all is done.
            before = {s: signal.signal(s, _nothing) for s in (signal.SIGTERM, signal.SIGINT)}

        def compiled() -> None:
            if self.batcher.failed:
                self.should_exit = True
            else:
                ready()

        self.batcher.start(self.service.first_way(), compiled)
        try:
            self.run(sockets=[bound])
        finally:
            self.batcher.stop()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.batcher.failed:
            raise RunError(f"the first plan cannot be compiled: {self.batcher.failed}")


def bind(host: str, port: int) -> socket.socket:
    """A socket of that address; port 0 is any that is free.

    Raises:
      InputError: it cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as e:
        said = getattr(e, "strerror", None) or e
        raise InputError(f"--host={host} --port={port}: {said}; give another") from e
    return bound


def _nothing(*_: Any) -> None:
    pass
