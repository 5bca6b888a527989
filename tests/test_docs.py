"""README and docs: every command is there, every block runs or says why not, every link leads."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import pytest
import yaml

from ppflow_jax import __main__ as ppflow
from tests import commands, pages
from tests.pages import PAGES, ROOT

PROGRAMS = [
    p for name in ("benchmarks", "study", "tests/acceptance") for p in ROOT.glob(f"{name}/*.py")
]
TEXTS = {page: page.read_text() for page in PAGES}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@pytest.mark.parametrize("page", sorted(PAGES + PROGRAMS), ids=name_of)
def test_quoted_commands_exist(page):
    text = page.read_text()
    modules = set(re.findall(r"python3? -m ([a-z]\w*(?:\.[a-z]\w*)*)", text))
    files = set(re.findall(r"\b(?:configs|tests|study|benchmarks|launch)/[\w/]+\.\w+", text))
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    missing += [name for name in files if not (ROOT / name).exists()]
    assert not missing


@each_page
def test_commands_and_flags_exist(page):
    found = [
        c for b in pages.blocks(TEXTS[page]) if b.language == "bash" for c in pages.shell(b.text)
    ]
    found += pages.quoted(TEXTS[page])
    bad = {" ".join(command): said for command in found if (said := pages.wrong(command))}
    assert not bad


@pytest.mark.parametrize(
    "command",
    [
        "ppflow smaple --num=4",
        "ppflow sample --stepz=3",
        "ppflow sample --steps=many",
        "ppflow train --config=digits --config.train.stepz=3",
        "ppflow train --config=ppflow_b4",
        "JAX_PLATFORMS=cpu python -m ppflow_jax.bench --sizes=B",
        "python -m ppflow_jax.nothing",
        "python -m benchmarks.peer_torch --round=3",
        "python -m study.run --config=configs/digits.py --config.train.stepz=3",
        "python -m tests.acceptance.meshes --folder=DIR",
        "make tests",
        "launch/slurm.sh --node=4 -- ppflow train",
        "launch/tpu_pod.sh create_all --name=a",
        "launch/k8s.sh --nodes=4 -- ppflow train --workdirs=DIR",
        "ls",
    ],
)
def test_a_wrong_command_is_found(command):
    [words] = pages.shell(command)
    assert pages.wrong(words)


@each_page
def test_blocks_run_or_say_why_not(page):
    for block in pages.blocks(TEXTS[page]):
        where = f"{page.name}:{block.line}"
        assert block.language in pages.LANGUAGES, where
        if block.note.startswith("run by "):
            test = ROOT / block.note.removeprefix("run by ")
            assert name_of(page) in test.read_text() or page.name in test.read_text(), where
        if block.language == "text":
            assert not any(map(pages._OURS.match, block.text.splitlines())), where


@pytest.fixture(scope="module")
def run(small_run, tmp_path_factory):
    """A copy, in place of the demo's run: blocks write into it."""
    return shutil.copytree(small_run, tmp_path_factory.mktemp("docs") / "digits")


@pytest.fixture
def session(run, tmp_path, monkeypatch):
    """A folder as a reader has it after `make demo`."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    plt.close("all")


def here(page: Path) -> list[pages.Block]:
    """The blocks of a page that run in these tests."""
    return [b for b in pages.blocks(TEXTS[page]) if not b.note and b.language != "text"]


def param(page: Path):
    long = page.name in ("moe.md", "tune.md")
    return pytest.param(page, id=name_of(page), marks=[pytest.mark.long] * long)


@pytest.mark.parametrize("page", [param(p) for p in PAGES if here(p)])
def test_blocks_run(page, session):
    if page.name == "README.md":  # who reads it has no run yet
        (session / "runs" / "digits").unlink()
    names: dict[str, object] = {}
    for block in here(page):
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block.text, f"{page.name}:{block.line}", "exec"), names)
        else:
            for command in pages.shell(block.text):
                run_command(command)


def run_command(command: list[str]) -> None:
    program, name, *flags = command
    assert program == "ppflow", f"{' '.join(command)}: say what it needs, or which test runs it"
    if name == "--help":
        with (
            mock.patch.object(sys, "argv", ["ppflow", name]),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            ppflow.main()
        return
    small = commands.SMALL if name == "train" else []
    with mock.patch.dict(commands.REQUIRED, sample=("checkpoint",)):
        code, _, err = commands.run(pages.MODULES[name], *flags, *small)
    assert code == 0, (command, err)


@pytest.mark.long
def test_the_notebook_runs(session, monkeypatch, capsys):
    file = ROOT / "examples" / "quickstart.ipynb"
    cells = [c for c in json.loads(file.read_text())["cells"] if c["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    (session / "examples").mkdir()
    monkeypatch.chdir(session / "examples")
    monkeypatch.setattr(plt, "show", lambda: None)
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{file.name}, cell {number}", "exec"), names)
    out = capsys.readouterr().out
    assert out.count("faster by FLOPs") == 2 and out.count(" error 0.") == 2
    assert len(plt.get_fignums()) == 4


@each_page
def test_links_lead_somewhere(page):
    text = pages._FENCE.sub("", TEXTS[page])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text()), target


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", pages._FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    found: list[str] = []

    def walk(entries):
        for entry in entries:
            for value in entry.values():
                walk(value) if isinstance(value, list) else found.append(value)

    walk(nav)
    assert sorted(found) == sorted(p.name for p in (ROOT / "docs").glob("*.md"))
    for page in ("contributing", "changelog"):
        included = re.fullmatch(r'--8<-- "(.*)"\n', (ROOT / "docs" / f"{page}.md").read_text())
        assert (ROOT / included[1]).exists()


def test_the_reference_names_what_there_is():
    text = (ROOT / "docs" / "reference.md").read_text()
    for name in re.findall(r"^::: (\S+)$", text, re.M):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    import ppflow_jax as pf

    missing = [n for n in pf.__all__ if n != "__version__" and f".{n}\n" not in text]
    assert not missing


def test_the_readme_is_short_and_the_versions_agree():
    assert (ROOT / "README.md").read_text().count("\n") <= 120
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
