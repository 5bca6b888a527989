"""Every command that is quoted anywhere is there, with the files that pages name."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("tests/*/README.md")]
PROGRAMS = [
    p for name in ("benchmarks", "study", "tests/acceptance") for p in ROOT.glob(f"{name}/*.py")
]


@pytest.mark.parametrize("page", sorted(PAGES + PROGRAMS), ids=lambda page: page.stem)
def test_quoted_commands_exist(page):
    text = page.read_text()
    modules = set(re.findall(r"python3? -m ([a-z]\w*(?:\.[a-z]\w*)*)", text))
    files = set(re.findall(r"\b(?:configs|tests|study|benchmarks|launch)/[\w/]+\.\w+", text))
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    missing += [name for name in files if not (ROOT / name).exists()]
    assert not missing
