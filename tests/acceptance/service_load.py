"""A service under many clients at once, against `sample` with the same microbatch.

    python -m tests.acceptance.service_load --checkpoint=DIR [--clients=64] [--seconds=60] \
        [--rounds=3] [--steps=50] [--solver=heun] [--microbatch=16]

Every client asks for one picture after another, of its own labels, seeds and one of three guidance
scales. `sample` is measured before and after every round, half as long. Exit code 0 only if there
was no error but 429, the throughput is at least 0.9 of that of `sample` in the median round,
pictures have the same bits, and a service that was killed starts again with these and ends by
SIGTERM with exit code 0.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import multiprocessing
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np

GUIDANCE = (1.5, 2.0, 4.0)
COMPARED = 6


def sampled(args: argparse.Namespace, seconds: float, asked: list[dict]) -> tuple[float, list]:
    """Images in a second, as `sample` makes them, and the PNGs of what was asked."""
    import ppflow_jax as pf
    from ppflow_jax.data.save import png
    from ppflow_jax.devices.host_memory import keep_scratch

    keep_scratch()
    model = pf.load(args.checkpoint)
    settings = {"steps": args.steps, "solver": args.solver}
    plan = model.plan(cfg=GUIDANCE[1], **settings)
    count, files = 64 * args.microbatch, []
    for ask in asked:
        plan_of = model.plan(cfg=ask["guidance"], **settings)
        given = {"labels": ask["label"], "seed": ask["seed"], "microbatch": args.microbatch}
        files.append(png(model.sample(args.microbatch, plan=plan_of, **given).pictures[0]))
    ids, labels = np.arange(count), np.resize(np.int32(range(10)), count)
    start, done = None, 0
    while start is None or time.monotonic() - start < seconds:
        for part in model.images(ids, labels, plan=plan, microbatch=args.microbatch):
            done += len(part.ids) if start else 0
            start = start or time.monotonic()  # the first microbatch compiles
            if time.monotonic() - start >= seconds:
                break
    return done / (time.monotonic() - start), files


def apart(function: Any, *args: Any) -> Any:
    """The result of a function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def start_service(args: argparse.Namespace, port: int) -> subprocess.Popen:
    line = [sys.executable, "-m", "ppflow_jax.serve", f"--checkpoint={args.checkpoint}"]
    line += [f"--port={port}", f"--microbatch={args.microbatch}"]
    service = subprocess.Popen(line)
    while service.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return service
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit(f"the service ended with {service.returncode}")


def ask_once(port: int, ask: dict) -> bytes:
    url, headers = f"http://127.0.0.1:{port}/v1/images", {"content-type": "application/json"}
    request = urllib.request.Request(url, json.dumps(ask).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as reply:
        return reply.read()


async def client(number: int, port: int, end: float, args: Any, found: list) -> None:
    """(status, seconds, ended at) of every request; status is text for what is no answer."""
    draw, streams = random.Random(number), None
    while (start := time.monotonic()) < end:
        ask = one(draw, args)
        try:
            streams = streams or await asyncio.open_connection("127.0.0.1", port)
            status, later = await exchange(*streams, json.dumps(ask).encode())
        except (OSError, EOFError, ValueError) as e:
            status, later, streams = type(e).__name__, 0.1, None
        now = time.monotonic()
        found.append((status, now - start, now))
        await asyncio.sleep(later)
    if streams:
        streams[1].close()


async def exchange(reader: Any, writer: Any, body: bytes) -> tuple[int, float]:
    """Status, and seconds to wait before the next request."""
    head = "POST /v1/images HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines if line)
    content = await reader.readexactly(int(headers["content-length"]))
    status = int(first.split()[1])
    if status == 200 and not content.startswith(b"\x89PNG"):
        raise ValueError("no PNG")
    return status, float(headers.get("retry-after", 0))


def one(draw: random.Random, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "label": draw.randrange(10),
        "seed": draw.randrange(2**32),
        "guidance": draw.choice(GUIDANCE),
        "steps": args.steps,
        "solver": args.solver,
    }


def under_load(args: argparse.Namespace, port: int) -> list[tuple[int | str, float, float]]:
    """(status, seconds, seconds from the start to its end) of every request."""
    start = time.monotonic()

    async def clients() -> list:
        found: list = []
        end = start + args.seconds
        await asyncio.gather(*(client(k, port, end, args, found) for k in range(args.clients)))
        return [(status, took, at - start) for status, took, at in found]

    return asyncio.run(clients())


def throughput(answers: list, seconds: float) -> float:
    """Pictures in a second, up to the last one: as for `sample`, what is half done has no time."""
    done = [at for status, _, at in answers if status == 200 and at <= seconds]
    return len(done) / max(done)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--solver", default="heun")
    parser.add_argument("--microbatch", type=int, default=16)
    args = parser.parse_args()

    asked = [one(random.Random(1000 + k), args) for k in range(COMPARED)]
    before, expected = apart(sampled, args, args.seconds / 2, asked)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    service = start_service(args, port)
    ask_once(port, asked[0])  # compiles
    found, ratios = [], []
    for _ in range(args.rounds):
        answers = under_load(args, port)
        rate = throughput(answers, args.seconds)
        after, _ = apart(sampled, args, args.seconds / 2, [])
        ratios.append(2 * rate / (before + after))
        said = f"sample {before:.2f} and {after:.2f} images/s, service {rate:.2f} between them"
        print(f"{said}: {ratios[-1]:.3f}", flush=True)
        found, before = found + answers, after
    equal = [ask_once(port, ask) == file for ask, file in zip(asked, expected)]
    service.kill()
    print(f"SIGKILL: {service.wait()}", flush=True)
    service = start_service(args, port)
    equal.append(ask_once(port, asked[0]) == expected[0])
    service.terminate()
    code = service.wait()

    kinds = collections.Counter(status for status, _, _ in found)
    seconds = [took for status, took, _ in found if status == 200]
    p50, p95 = np.quantile(seconds, (0.5, 0.95))
    ratio = float(np.median(ratios))
    print(f"{args.clients} clients, {args.seconds:g} s: answers by kind {dict(kinds)}")
    print(f"latency p50 {p50:.2f} s, p95 {p95:.2f} s; service / sample {ratio:.3f}")
    same = f"{sum(equal)} of {len(equal)} pictures equal, the last after the restart"
    print(f"{same}; exit code after SIGTERM {code}")
    good = set(kinds) <= {200, 429} and ratio >= 0.9 and all(equal) and code == 0
    print("PASS" if good else "FAIL")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
