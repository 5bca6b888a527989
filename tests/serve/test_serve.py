"""Pictures over HTTP: their bits, their microbatches, errors and the end of the service."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
from PIL import Image

from ppflow_jax.autoencoders.decode import Decoder
from ppflow_jax.data.save import png
from ppflow_jax.errors import RunError
from ppflow_jax.serve import batcher as batcher_module
from ppflow_jax.serve import device as device_module
from ppflow_jax.serve.batcher import Full, Job
from ppflow_jax.serve.device import Row, Way
from tests import commands
from tests.serve.service import FAST, Client, batcher_of, running, until


@pytest.fixture(scope="module")
def batcher(model):
    return batcher_of(model)


@pytest.fixture(scope="module")
def client(model, batcher):
    with running(batcher, Way(model.plan(steps=4, solver="euler"))) as port:
        yield Client(port)


def expected(model, label: int, seed: int, guidance, n: int = 1) -> list[bytes]:
    """PNGs of images 0 to n - 1, as `sample` makes them in microbatches of 2 on 8 devices."""
    plan = model.plan(steps=4, solver="euler", cfg=guidance)
    made = model.sample(16, plan=plan, labels=label, seed=seed, microbatch=2)
    return [png(picture) for picture in made.pictures[:n]]


def test_the_bits_are_those_of_sample(run, client, tmp_path):
    flags = (f"--checkpoint={run}", f"--out={tmp_path}/out", "--num=16", "--microbatch=2")
    plan = ("--cfg=1,2", "--steps=4", "--solver=euler", "--labels=4", "--seed=7")
    code, _, err = commands.run("sample", *flags, *plan)
    assert code == 0, err
    files = [f.read_bytes() for f in sorted((tmp_path / "out" / "images").iterdir())]
    one = client.post("/v1/images", {"label": 4, "seed": 7, **FAST})
    assert one.status == 200 and one.headers["content-type"] == "image/png"
    assert one.content == files[0]
    assert one.headers["x-label"] == "4" and one.headers["x-seed"] == "7"
    assert one.headers["x-plan"] == "euler, 4 steps, guidance 1,2, exact, 4 NFE"
    assert float(one.headers["x-device-milliseconds"]) > 0
    body = {"label": "4", "seed": 7, "n": 3, **FAST}
    several = client.post("/v1/images", body, "application/json").json
    assert [base64.b64decode(code) for code in several["images"]] == files[:3]


def test_the_bits_do_not_depend_on_the_company(model, client, batcher):
    asked = [(k % 10, 3 * k, [(1.0, 2.0), (1.0, 3.5), (2.0, 2.0)][k % 3]) for k in range(40)]

    def call(label, seed, guidance):
        body = {**FAST, "label": label, "seed": seed, "guidance": guidance}
        return client.post("/v1/images", body)

    before = batcher.microbatches
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        replies = list(pool.map(call, *zip(*asked)))
    assert {reply.status for reply in replies} == {200}
    assert batcher.microbatches - before < 20
    for k in range(0, 40, 7):
        assert [replies[k].content] == expected(model, *asked[k])


def test_latents_have_the_same_bits_too(model, monkeypatch):
    kept, shown = [], Decoder.pictures

    def pictures(self, latents, chunk=16):
        kept.append(latents)
        return shown(self, latents, chunk)

    monkeypatch.setattr(Decoder, "pictures", pictures)
    device, plan = batcher_of(model).device, model.plan(steps=4, solver="euler", cfg=(1, 2))
    rows = [Row(k, 5 * k, k % 3) for k in range(5)]
    ends = []
    for staged in (False, True):
        list(device.run(Way(plan, staged), rows))
        ends.append(kept[-1])
    for place, (label, seed, number) in enumerate(rows):
        made = model.sample(16, plan=plan, labels=label, seed=seed, microbatch=2)
        for end in ends:
            np.testing.assert_array_equal(end[place], made.latents[number])


def test_stages_end_with_the_same_bits(model, client):
    body = {"label": 4, "seed": 7, **FAST}
    first, *stages = client.post("/v1/stages", body).lines
    assert [s["tokens"] for s in first["stages"]] == [4, 16]
    assert [s["guidance"] for s in first["stages"]] == [1, 2]
    assert sum(s["evaluations"] for s in first["stages"]) == 4
    assert [s["stage"] for s in stages] == [0, 1]
    assert all(s["device_milliseconds"] > 0 for s in stages)
    pictures = [base64.b64decode(s["picture"]) for s in stages]
    assert pictures[1] == base64.b64decode(stages[1]["state"]) != pictures[0]
    assert [pictures[1]] == expected(model, 4, 7, (1, 2))
    # after the first stage: x1 = x + (1 - t) v
    plan = model.plan(steps=4, solver="euler", cfg=(1, 2))
    x = model.trajectory(1, plan=plan, labels=4, seed=7)[2]
    clean = x + 0.5 * np.asarray(model.velocity(x, 0.5, 4))
    shown = np.asarray(Image.open(io.BytesIO(pictures[0])), float)
    np.testing.assert_allclose(shown, np.clip(127.5 * clean[0, ..., 0] + 128, 0, 255), atol=1.01)


def test_equal_plans_and_scales_share_microbatches(model):
    batcher, told = batcher_of(model), []

    def ask(cfg, rows):
        way = Way(model.plan(steps=4, solver="euler", cfg=cfg))
        job = Job(way, [Row(1, k, 0) for k in range(rows)], lambda it: told.append((cfg, it)))
        batcher.submit(job)
        return job

    jobs = [ask((1.0, 2.0), 1) for _ in range(18)]
    ask((1, 5), 3)
    batcher.cancel(jobs[3])
    assert batcher.waiting == 20
    batcher.start(Way(model.plan(steps=4, solver="euler")))
    batcher.stop()
    assert (batcher.microbatches, batcher.images, batcher.waiting) == (3, 20, 0)
    assert [cfg for cfg, _ in told] == [(1.0, 2.0)] * 16 + [(1.0, 2.0)] + [(1, 5)] * 3
    with pytest.raises(Full, match="stopping"):
        ask(2.0, 1)


def test_full_microbatches_overtake_only_so_often(model, monkeypatch):
    monkeypatch.setattr(batcher_module, "WAIT", 60)
    batcher, order = batcher_of(model, 1000), []
    monkeypatch.setattr(batcher.device, "run", lambda way, rows: order.append(rows) or [])
    plans = [model.plan(steps=4, solver="euler", cfg=cfg) for cfg in (2, 3)]
    for plan, rows in zip(plans, (1, 16 * 12)):
        batcher.submit(Job(Way(plan), [Row(1, 0, 0)] * rows, lambda it: None))
    batcher.start(Way(plans[0]))
    until(lambda: batcher.images == 1 + 16 * 12)
    batcher.stop()
    assert [len(rows) for rows in order[1:]] == [16] * 8 + [1] + [16] * 4


def test_a_full_queue_says_when_to_come_back(model, client, batcher, monkeypatch):
    monkeypatch.setattr(batcher, "most", 2)
    reply = client.post("/v1/images", {"label": 1, "n": 3, **FAST}, "application/json")
    assert reply.status == 429 and int(reply.headers["retry-after"]) >= 1
    assert "at most 2" in reply.json["error"]
    idle = batcher_of(model)
    for steps in range(3, 8):
        job = Job(Way(model.plan(steps=steps, solver="euler")), [Row(1, 1, 0)], lambda it: None)
        if steps < 7:
            idle.submit(job)
    with pytest.raises(Full, match="wait to be compiled"):
        idle.submit(job)


def test_few_programs_are_kept(model, monkeypatch):
    monkeypatch.setattr(device_module, "MOST_PROGRAMS", 2)
    device, pictures = batcher_of(model).device, []
    for steps in (2, 3, 4, 2):
        way = Way(model.plan(steps=steps, solver="euler"))
        (made,) = device.run(way, [Row(1, 1, 0)])
        pictures.append(made.clean)
        assert device.programs <= 2 and device.ready(way)
    np.testing.assert_array_equal(pictures[0], pictures[3])
    assert device.compiled == 4


@pytest.mark.parametrize(("error", "status"), [(RunError("not finite"), 422), (KeyError("x"), 500)])
def test_a_failure_is_of_its_request_alone(client, batcher, monkeypatch, error, status):
    def fail(way, rows):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(batcher.device, "run", fail)
        reply = client.post("/v1/images", {"label": 1, **FAST})
        assert reply.status == status and "error" in reply.json
        assert "error" in client.post("/v1/stages", {"label": 1, **FAST}).lines[-1]
    assert client.post("/v1/images", {"label": 1, **FAST}).status == 200


def test_model_page_and_metrics(client):
    about = client.get("/v1/model").json
    assert [c["label"] for c in about["classes"]] == list(range(10))
    assert [s["tokens"] for s in about["stages"]] == [4, 16]
    assert about["defaults"]["steps"] == 50 and about["limits"]["steps"] == 250
    page = client.get("/")
    assert page.status == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|@import|url\(", page.content.decode())
    client.get("/nothing")
    text = client.get("/metrics").content.decode()
    assert 'ppflow_requests_total{path="other",status="404"} 1' in text
    assert re.search(r'ppflow_latency_seconds\{quantile="0.95"\} \d+\.\d+', text)
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert int(values["ppflow_images_total"]) >= int(values["ppflow_microbatches_total"]) > 0
    assert values["ppflow_queue_images"] == "0"


def test_what_is_missing_is_named(monkeypatch, run):
    monkeypatch.delitem(sys.modules, "ppflow_jax.serve.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = commands.run("serve.__main__", f"--checkpoint={run}")
    assert code == 1 and "uvicorn is not installed: pip install 'ppflow_jax[serve]'" in err
    monkeypatch.undo()
    for args, words in (
        (["--port=99999"], "--port=99999"),
        (["--host=300.1.1.1"], "--host=300.1.1.1"),
        (["--port=0", "--max_queue=0"], "--max_queue must be"),
        (["--port=0", "--decode=vae:x"], "this model makes pixels"),
    ):
        code, _, err = commands.run("serve.__main__", f"--checkpoint={run}", *args)
        assert code == 1 and words in err and err.count("\n") == 1, err


@pytest.mark.long
def test_sigterm_answers_what_was_asked_and_ends(run):
    line = [sys.executable, "-m", "ppflow_jax.serve", f"--checkpoint={run}", "--port=0"]
    kept = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        line, cwd=commands.ROOT, stderr=subprocess.PIPE, text=True, env=kept
    ) as p:
        try:
            address = p.stderr.readline().split()[-1]
            body = json.dumps({"label": 1, "seed": 1, "steps": 3}).encode()
            headers = {"content-type": "application/json"}
            request = urllib.request.Request(f"{address}/v1/images", body, headers)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                reply = pool.submit(urllib.request.urlopen, request, timeout=60)

                def waits():
                    text = urllib.request.urlopen(f"{address}/metrics").read().decode()
                    return "ppflow_queue_images 1" in text or "compilations_total 2" in text

                until(lambda: reply.done() or waits())
                p.send_signal(signal.SIGTERM)
                assert reply.result(60).read().startswith(b"\x89PNG")
            assert p.wait(60) == 0
            assert p.stderr.read() == "stopped; everything that was asked for is answered\n"
        finally:
            p.kill()
