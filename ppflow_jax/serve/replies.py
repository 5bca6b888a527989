"""Bodies, errors and other replies."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ppflow_jax.errors import InputError, RunError
from ppflow_jax.serve.batcher import Broken, Full

MOST_BYTES = 16_384  # of a body
BODY_SECONDS = 10  # for a client to send it
# RunError: images that are not finite. Nobody is there to read the last.
STATUS = {InputError: 400, Full: 429, RunError: 422, Broken: 500, ClientDisconnect: 499}


async def body_of(request: Request) -> bytes:
    """
    Raises:
      HTTPException: not JSON by its header, too long, or too slow.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        # Pages of other origins cannot say so without being asked first.
        raise HTTPException(415, "send JSON with the header Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MOST_BYTES:
                    raise HTTPException(413, f"a body has at most {MOST_BYTES} bytes")
    except TimeoutError:
        raise HTTPException(408, f"the body did not come in {BODY_SECONDS} s") from None
    return bytes(body)


def failed(request: Request, error: Exception) -> Response:
    status, message = failure(error)
    headers = {}
    if isinstance(error, Full):
        headers["retry-after"] = str(error.seconds)
    if status in (408, 413, 415):  # the rest of the body is not read
        headers["connection"] = "close"
    if isinstance(error, HTTPException) and error.headers:
        headers.update(error.headers)
    return as_json({"error": message}, status, headers)


def failure(error: Exception) -> tuple[int, str]:
    """Status and one line."""
    if isinstance(error, HTTPException):
        return error.status_code, error.detail
    for kind, status in STATUS.items():
        if isinstance(error, kind):
            return status, " ".join(str(error).split())
    return 500, "the service failed; its log says why"


def as_json(values: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(line_of(values), status, headers, "application/json")


def line_of(values: Any) -> bytes:
    return (json.dumps(values) + "\n").encode()
