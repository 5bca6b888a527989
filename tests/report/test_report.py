import base64
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from ppflow_jax.report.run import differences, open_runs
from ppflow_jax.report.strip import _estimates, _shown
from tests.commands import ROOT, run

EVALUATION = {
    "metrics": {"fid": 12.5, "kid": 0.25, "kid_std": 0.01},
    "samples": {
        "name": "samples.npz",
        "count": 2000,
        "card": {
            "settings": {"solver": "heun", "steps": 10, "cfg": [1.0, 3.0]},
            "nfe": 20,
            "seconds": 50.0,
            "images_in_these_seconds": 2000,
        },
    },
    "features": {"network": "small", "trained_on": "digits", "digest": "0123456789"},
    "notes": ["not comparable with Inception FID"],
}


FRONT = {
    "unit": "of the FLOPs",
    "points": [{"cost": 0.05, "error": 0.2, "pyramid": "4x4@0.5,2x2@1"}],
    "own": {"cost": 0.1, "error": 0.1, "pyramid": "2x2@1"},
}
PLAN = {
    "format": 1,
    "pyramid": "2x2@1",
    "flow": {},
    "cfg": [1.0],
    "cfg_channels": 0,
    "times": [0.0, 0.5, 1.0],
    "stages": [0, 0],
    "scales": [1.0, 1.0],
    "rule": {"basis": "velocity", "history": 1, "corrects": False},
    "weights": [[1.0, 0.5], [1.0, 0.5]],
    "corrector": None,
    "made": {"command": "ppflow tune", "held_out_errors": {"plan": 0.1234}, "front": FRONT},
}


@pytest.fixture(scope="module")
def runs(small_run, small_sit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(small_sit, folder / "one")
    shutil.copytree(small_run, folder / "two <levels>")
    judged = folder / "one" / "evaluations"
    judged.mkdir()
    (folder / "one" / "plan.json").write_text(json.dumps(PLAN))
    (judged / "final.json").write_text(json.dumps(EVALUATION))
    (judged / "step_0000001.json").write_text("of a training step: its values are in the curves")
    return folder / "one", folder / "two <levels>"


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    code, text, err = run("report.__main__", *runs, f"--out={out}", "--steps=4")
    assert code == 0, err
    assert "2 run(s)" in text
    return out.read_text()


class _Parser(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links, self.images, self.texts = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href")]
        self.images += [dict(attrs)["src"]] if tag == "img" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def parsed(page):
    parser = _Parser()
    parser.feed(page)
    return parser


def test_the_page_is_whole_and_needs_no_network(parsed, page):
    assert not parsed.open
    assert all(link.startswith("data:image/") for link in parsed.links)
    assert "<script" not in page
    assert not re.search(r"url\(|@import", page)
    for image in parsed.images:
        kind, code = re.fullmatch(r"data:image/([a-z+]+);base64,(.+)", image).groups()
        start = {"png": b"\x89PNG", "svg+xml": b"<?xml"}[kind]
        assert base64.b64decode(code).startswith(start)


def test_the_page_says_what_the_runs_are(parsed):
    texts = parsed.texts
    assert texts.count("2x2@1") >= 2 and "4x4@0.5,2x2@1" in texts  # runs and their differences
    assert "two <levels>" in texts  # names are text, not markup
    assert {"heun 10, guidance 1,3", "12.5", "0.025", "20", "FID ↓"} <= set(texts)
    assert "not comparable with Inception FID" in texts
    assert {"0.1234", "cost and error of other patches, one"} <= set(texts)
    assert any("one: 2 steps, made by ppflow tune" in text for text in texts)
    assert any("red: stage boundary, t = 0.5" in text for text in texts)


def test_differences_are_those_of_the_configuration(runs):
    found = dict(differences(open_runs([str(r) for r in runs])))
    assert found == {"model.pyramid": ["2x2@1", "4x4@0.5,2x2@1"]}


def test_estimates_of_a_straight_path_are_its_end():
    from ppflow_jax.flow.path import Flow

    rng = np.random.default_rng(0)
    x0, x1 = rng.standard_normal((2, 4, 4, 1), np.float32)
    times = np.float32([0, 0.25, 0.5, 1])
    states = np.stack([t * x1 + (1 - t) * x0 for t in times])
    estimates = _estimates(Flow(), states, times)
    np.testing.assert_allclose(estimates, np.broadcast_to(x1, states.shape), atol=1e-5)


def test_every_boundary_is_shown():
    stages = (0,) * 47 + (1,) * 30 + (2,) * 23
    shown = _shown(stages)
    assert {0, 47, 77, 100} <= set(shown) and len(shown) <= 12


def test_bad_input_is_one_line(runs, tmp_path):
    one = runs[0]
    broken = tmp_path / "broken"
    broken.mkdir()
    cases = [
        ([], 2, "give RUN..."),
        ([broken], 1, "no checkpoint"),
        ([one, one], 1, "given twice"),
        ([one, "--label=10"], 1, "classes 0 to 9"),
        ([one, f"--out={tmp_path}"], 1, "is a folder"),
        ([one, "--steps=0"], 1, "steps must be at least 1"),
        ([one, "--decode=taesd:nowhere"], 1, "makes pixels"),
    ]
    for arguments, code, message in cases:
        found, _, err = run("report.__main__", *arguments)
        assert found == code and message in err and err.count("\n") == 1, (arguments, err)
    path = one / "later.evaluation.json"
    path.write_text("{}")
    try:
        found, _, err = run("report.__main__", one)
        assert found == 1 and "is not what evaluate writes" in err and err.count("\n") == 1
    finally:
        path.unlink()
    path, kept = one / "plan.json", (one / "plan.json").read_text()
    for made in ({}, {"command": "x", "held_out_errors": []}, PLAN["made"] | {"front": [1]}):
        path.write_text(json.dumps(PLAN | {"made": made}))
        found, _, err = run("report.__main__", one)
        assert found == 1 and "not what `ppflow tune` writes" in err and err.count("\n") == 1
    path.write_text(kept)


def test_the_readme_names_the_command():
    assert "ppflow_jax.report" in (ROOT / "README.md").read_text()
