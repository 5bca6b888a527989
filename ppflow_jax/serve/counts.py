"""What /metrics says, in the text format of Prometheus."""

from __future__ import annotations

from collections import Counter, deque

import numpy as np
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ppflow_jax.serve.batcher import Batcher

QUANTILES = (0.5, 0.95, 0.99)
LATEST = 1024  # requests that the quantiles are of


class Counts:
    """Requests by path and status, and how long those for images took."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.seconds: deque[float] = deque(maxlen=LATEST)
        self.total, self.count = 0.0, 0

    def took(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.total += seconds
        self.count += 1

    def text(self, batcher: Batcher) -> str:
        device = batcher.device
        lines = ["# TYPE ppflow_requests_total counter"]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'ppflow_requests_total{{path="{path}",status="{status}"}} {count}')
        for name, kind, value in (
            ("images_total", "counter", batcher.images),
            ("microbatches_total", "counter", batcher.microbatches),
            ("microbatch_images", "gauge", device.size),
            ("compilations_total", "counter", device.compiled),
            ("programs", "gauge", device.programs),
            ("queue_images", "gauge", batcher.waiting),
            ("queue_images_limit", "gauge", batcher.most),
        ):
            lines += [f"# TYPE ppflow_{name} {kind}", f"ppflow_{name} {value}"]
        lines.append("# TYPE ppflow_latency_seconds summary")
        if self.seconds:
            for q, value in zip(QUANTILES, np.quantile(list(self.seconds), QUANTILES)):
                lines.append(f'ppflow_latency_seconds{{quantile="{q}"}} {value:.6f}')
        lines.append(f"ppflow_latency_seconds_sum {self.total:.6f}")
        lines.append(f"ppflow_latency_seconds_count {self.count}")
        return "\n".join(lines) + "\n"


class Counted:
    """Counts what an application answers."""

    def __init__(self, app: ASGIApp, counts: Counts, paths: set[str]):
        self.app, self.counts, self.paths = app, counts, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.counts.requests[path, message["status"]] += 1
            await send(message)

        await self.app(scope, receive, counted)
