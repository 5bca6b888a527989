"""The service over HTTP: what each address answers."""

from __future__ import annotations

import asyncio
import base64
import functools
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ppflow_jax.api.requests import MOST_GUIDANCE
from ppflow_jax.data.save import png
from ppflow_jax.errors import InputError, RunError
from ppflow_jax.generate.plan_file import PlanFile
from ppflow_jax.serve.ask import MOST_IMAGES, MOST_STEPS, SOLVERS, TUNED, Ask, parse
from ppflow_jax.serve.batcher import Batcher, Broken, Job, Picture
from ppflow_jax.serve.counts import Counted, Counts
from ppflow_jax.serve.device import Row, Way, stages_of
from ppflow_jax.serve.replies import MOST_BYTES, STATUS, as_json, body_of, failed, failure, line_of
from ppflow_jax.systems.accelerate import PRESETS

PAGE = Path(__file__).with_name("page.html")
# The page needs nothing but itself and this service.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)


class Service:
    """Answers from a batcher; `tuned` is the plan of the preset of that name."""

    def __init__(self, batcher: Batcher, tuned: PlanFile | None = None):
        self.tuned, self.presets = tuned, (*PRESETS, *((TUNED,) if tuned else ()))
        self.batcher, self.model = batcher, batcher.device.model
        self.counts = Counts()
        # Requests repeat few plans, and making one takes a millisecond.
        self.way = functools.lru_cache(256)(self._way)

    def app(self) -> Counted:
        """The ASGI application."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/model", self.about),
            Route("/v1/images", self.images, methods=["POST"]),
            Route("/v1/stages", self.stages, methods=["POST"]),
        ]
        kinds: tuple[Any, ...] = (*STATUS, HTTPException, Exception)
        app = Starlette(routes=routes, exception_handlers=dict.fromkeys(kinds, failed))
        return Counted(app, self.counts, {route.path for route in routes})

    def first_way(self) -> Way:
        """Of a request that leaves everything out."""
        stages = len(self.model.config.pyramid)
        return self.way(Ask.steps, Ask.solver, Ask.preset, (1.0,) * stages, False)

    def _way(self, steps: int, solver: str, preset: str, guidance: tuple, staged: bool) -> Way:
        if preset == TUNED:
            return Way(self.model.plan(self.tuned, cfg=guidance), staged)
        plan = self.model.plan(steps=steps, solver=solver, cfg=guidance, accelerate=preset)
        return Way(plan, staged)

    async def page(self, request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(), headers={"content-security-policy": POLICY})

    async def health(self, request: Request) -> Response:
        if self.batcher.ready.is_set():
            return as_json({"status": "ready"})
        return as_json({"status": "compiling"}, 503)

    async def metrics(self, request: Request) -> Response:
        text = self.counts.text(self.batcher)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def about(self, request: Request) -> Response:
        """Classes, stages, defaults and limits."""
        config, known = self.model.config, self.model.card.classes
        ask = Ask(0, 0, (1.0,) * len(config.pyramid))
        trained = known.trained(config.num_classes).tolist()
        sampled = (self.model.card.experiment or {}).get("sample", {})
        classes = [
            {"label": k, "name": known.names[k] if k < len(known.names) else None} for k in trained
        ]
        stages = [
            {
                "stage": i,
                "from": start,
                "to": end,
                "patch": list(reversed(config.pyramid.stages[i].patch)),
                "tokens": _tokens(config, i),
            }
            for i, (start, end) in enumerate(config.pyramid.intervals)
        ]
        return as_json(
            {
                "classes": classes,
                "no_class": config.num_classes,
                "stages": stages,
                "solvers": SOLVERS,
                "presets": list(self.presets),
                "defaults": {k: v for k, v in asdict(ask).items() if k != "label"},
                "run_guidance": sampled.get("cfg"),
                "limits": {
                    "n": MOST_IMAGES,
                    "steps": MOST_STEPS,
                    "guidance": MOST_GUIDANCE,
                    "queue": self.batcher.most,
                    "bytes": MOST_BYTES,
                },
                "microbatch": self.batcher.device.microbatch,
            }
        )

    async def images(self, request: Request) -> Response:
        """Finished images: a PNG, or JSON for who accepts that."""
        ask = parse(await body_of(request), self.model, self.presets)
        wants_json = "application/json" in request.headers.get("accept", "")
        if ask.n > 1 and not wants_json:
            raise InputError(f"n={ask.n}: several images need the header Accept: application/json")
        start, (way, job, news) = time.perf_counter(), self._job(ask, staged=False)
        self.batcher.submit(job)
        found: list[Picture] = []
        async for picture in self._news(request, job, news, ask.n):
            found.append(picture)
        if len(found) < ask.n:
            return Response(status_code=499)  # whom it was for has gone
        found.sort(key=lambda picture: picture.at)
        files = [await asyncio.to_thread(_file, picture) for picture in found]
        seconds = time.perf_counter() - start
        self.counts.took(seconds)
        facts = {
            "label": ask.label,
            "seed": ask.seed,
            "plan": _said(ask, way),
            "milliseconds": round(1000 * seconds, 1),
            "device_milliseconds": round(max(p.made.milliseconds for p in found), 1),
        }
        if wants_json:
            return as_json({**facts, "images": [base64.b64encode(file).decode() for file in files]})
        headers = {f"x-{name.replace('_', '-')}": str(value) for name, value in facts.items()}
        return Response(files[0], media_type="image/png", headers=headers)

    async def stages(self, request: Request) -> Response:
        """One image on its way: a line of JSON for the plan, then one for every stage."""
        ask = parse(await body_of(request), self.model, self.presets)
        if ask.n != 1:
            raise InputError(f"n={ask.n}: the stages are those of one image")
        way, job, news = self._job(ask, staged=True)
        ready = self.batcher.device.ready(way)
        self.batcher.submit(job)
        return StreamingResponse(
            self._lines(request, ask, (way, job, news), ready), media_type="application/x-ndjson"
        )

    async def _lines(
        self, request: Request, ask: Ask, work: tuple[Way, Job, asyncio.Queue], ready: bool
    ) -> AsyncIterator[bytes]:
        way, job, news = work
        parts, start = stages_of(way.plan), time.perf_counter()
        yield line_of(
            {
                "label": ask.label,
                "seed": ask.seed,
                "plan": _said(ask, way),
                "compiled": ready,
                "stages": [self._stage(*part) for part in parts],
            }
        )
        try:
            async for picture in self._news(request, job, news, len(parts)):
                clean, state = await asyncio.to_thread(_files, picture)
                yield line_of(
                    {
                        "stage": picture.made.stage,
                        "device_milliseconds": round(picture.made.milliseconds, 2),
                        "milliseconds": round(1000 * (time.perf_counter() - start), 1),
                        "picture": base64.b64encode(clean).decode(),
                        "state": base64.b64encode(state).decode(),
                    }
                )
        except (RunError, Broken) as e:
            yield line_of({"error": failure(e)[1]})

    def _stage(self, stage: int, segments: tuple) -> dict[str, Any]:
        evaluations = sum(s.steps * len(s.stages) for s in segments)
        return {
            "stage": stage,
            "from": round(segments[0].times[0], 6),
            "to": round(segments[-1].times[-1], 6),
            "tokens": _tokens(self.model.config, stage),
            "evaluations": evaluations,
            "guidance": segments[0].scales[0],
        }

    def _job(self, ask: Ask, staged: bool) -> tuple[Way, Job, asyncio.Queue]:
        way = self.way(ask.steps, ask.solver, ask.preset, ask.guidance, staged)
        loop, news = asyncio.get_running_loop(), asyncio.Queue()
        rows = [Row(ask.label, ask.seed, k) for k in range(ask.n)]
        return way, Job(way, rows, lambda it: loop.call_soon_threadsafe(news.put_nowait, it)), news

    async def _news(
        self, request: Request, job: Job, news: asyncio.Queue, count: int
    ) -> AsyncIterator[Picture]:
        """`count` pictures as they come, or fewer if the client goes."""
        gone = asyncio.ensure_future(_disconnected(request))
        gone.add_done_callback(lambda _: news.put_nowait(None))
        try:
            for _ in range(count):
                found = await news.get()
                if found is None:
                    return
                if isinstance(found, Exception):
                    raise found
                yield found
        finally:
            gone.cancel()
            self.batcher.cancel(job)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _file(picture: Picture) -> bytes:
    return png(picture.made.clean[picture.place])


def _files(picture: Picture) -> tuple[bytes, bytes]:
    return _file(picture), png(picture.made.states[picture.place])


def _tokens(config: Any, stage: int) -> int:
    rows, columns = config.pyramid.grid(stage, config.latent_size)
    return rows * columns


def _said(ask: Ask, way: Way) -> str:
    scales = ",".join(f"{scale:g}" for scale in ask.guidance)
    config = way.plan.config
    steps = f"{config.solver}, {config.steps} steps"
    return f"{steps}, guidance {scales}, {ask.preset}, {way.plan.nfe} NFE"
