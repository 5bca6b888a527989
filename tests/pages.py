"""README and docs as a test reads them: fenced blocks, quoted commands, what is wrong with these.

A block stands as it is run. A comment right before it says why it is not run here, or where:

    <!-- needs: a checkpoint of ImageNet -->
    <!-- run by tests/api/test_api.py -->
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from ml_collections import ConfigDict

from configs import common
from ppflow_jax.__main__ import COMMANDS
from tests import commands

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/*/README.md")],
    key=lambda page: str(page),
)
LANGUAGES = ("bash", "python", "text")
OTHERS = {"curl", "pip", "unzip"}  # programs that are not ours
# Commands as `commands.run` calls them.
MODULES = {name: module for name, (module, _) in COMMANDS.items()} | {
    "convert": "convert.__main__",
    "report": "report.__main__",
}
_FENCE = re.compile(r"(?:^<!-- ((?:needs: |run by ).+?) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)
_SPAN = re.compile(r"`([^`]+)`")
_OURS = re.compile(r"(?:[A-Z_]+=\S+ )*(?:ppflow|python -m|make|launch/\w+\.sh)\b")


@dataclass(frozen=True)
class Block:
    """A fenced block; `note` is the comment before it."""

    line: int
    language: str
    note: str
    text: str


def blocks(text: str) -> Iterator[Block]:
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start(2)) + 1
        yield Block(line, found[2], found[1] or "", found[3])


def shell(text: str) -> Iterator[list[str]]:
    """The commands of a script, word by word."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("&|;"):
                if command:
                    yield command
                command = []
            else:
                command.append(word)


def quoted(text: str) -> Iterator[list[str]]:
    """Commands of this project in the text and the tables of a page."""
    for span in _SPAN.findall(_FENCE.sub("", text)):
        if _OURS.match(span):
            yield from shell(" ".join(span.split()))


def wrong(command: list[str]) -> str:
    """What no command or flag of this project is called; empty if there is nothing."""
    while re.fullmatch(r"[A-Z_]+=.*", command[0]):
        command = command[1:]
    program, *rest = command
    if program == "ppflow":
        return _wrong_ppflow(rest)
    if program == "python" and rest[:1] == ["-m"]:
        return _wrong_module(rest[1], rest[2:])
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        return "".join(f"no target {name}; " for name in rest if name not in targets)
    if program.startswith("launch/"):
        return _wrong_script(program, rest)
    return "" if program in OTHERS else f"unknown program {program}"


def _wrong_ppflow(args: list[str]) -> str:
    name, *flags = args or ["--help"]
    if name in ("--help", "--version"):
        return ""
    if name not in COMMANDS:
        return f"no command {name}"
    return _refused(MODULES[name], flags) if flags else ""


def _refused(name: str, flags: list[str]) -> str:
    """What a command says to its flags; it is not run, and need not have all that it requires."""
    with (
        mock.patch.object(commands._load(name), "main", lambda *_: None),
        mock.patch.dict(commands.REQUIRED, {name: ()}),
    ):
        code, _, err = commands.run(name, *flags)
    return err if code else ""


def _wrong_module(module: str, args: list[str]) -> str:
    ours = {f"ppflow_jax.{there}": name for name, (there, _) in COMMANDS.items()}
    if module in ours:
        return _wrong_ppflow([ours[module], *args])
    spec = importlib.util.find_spec(module)
    if spec is None:
        return f"no module {module}"
    source = Path(spec.origin or "")
    return _unknown(args, _flags_of(source)) if source.is_relative_to(ROOT) else ""


def _flags_of(source: Path) -> set[str]:
    """Names that a program defines with absl or argparse."""
    calls = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call)]
    return {
        str(call.args[0].value).lstrip("-")
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and (call.func.attr.startswith("DEFINE_") or call.func.attr == "add_argument")
        and call.args
        and isinstance(call.args[0], ast.Constant)
    }


def _wrong_script(script: str, args: list[str]) -> str:
    """Of a launch script: its flags before --, a command after it."""
    text = (ROOT / script).read_text()
    end = args.index("--") if "--" in args else len(args)
    allowed = {"dry_run", "help", *re.findall(r'^parse "(.*?)"', text, re.M)[0].split()}
    words = [word for word in args[:end] if not word.startswith("--")]
    found = "".join(f"no action {word}; " for word in words if f"  {word}) " not in text)
    found += _unknown(args[:end], allowed)
    return found + (wrong(args[end + 1 :]) if args[end + 1 :] else "")


def _unknown(args: list[str], flags: set[str]) -> str:
    names = [arg[2:].partition("=")[0] for arg in args if arg.startswith("--")]
    return "".join(
        f"no flag --{name}; "
        for name in names
        if name not in flags
        and name.removeprefix("no") not in flags
        and not ("config" in flags and _setting(name))
    )


def _setting(name: str) -> bool:
    """Whether `config.a.b` is one."""
    first, *keys = name.split(".")
    place = common.get_config("S", "2x2@1")
    for key in keys:
        if not isinstance(place, ConfigDict) or key not in place:
            return False
        place = place[key]
    return first == "config"
