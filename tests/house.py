"""The house and its rules: python -m tests.house (part of `make lint`).

Rooms are the folders of the package and the files beside them. Imports go down FLOORS, never up or
around; files, functions and signatures stay small enough to be read at once.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ppflow_jax"
# From the ground up: a room imports from rooms of lower floors only.
FLOORS = (
    ("errors",),
    ("pyramid",),
    ("console",),
    ("files",),
    ("devices",),
    ("cli",),
    ("data",),
    ("models",),
    ("flow",),
    ("systems",),
    ("checkpoints",),
    ("autoencoders",),
    ("metrics",),
    ("generate",),
    ("train",),
    ("convert", "cost"),
    ("api",),
    ("tune",),
    ("report",),
    ("__init__",),
    ("main", "sample", "evaluate", "prepare", "bench", "serve"),
    ("__main__",),
)
MOST_ROOMS, MOST_ROOT_FILES = 28, 14
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 300, 60, 8
TABLES = {"metrics/inception.py", "systems/catalogue.py"}  # files that are mostly names


def main() -> int:
    files = sorted(PACKAGE.rglob("*.py"))
    found = [*layout(files)]
    for path in files:
        found += [*imports(path), *sizes(path)]
    print("\n".join(found) or "the house is in order")
    return int(bool(found))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def layout(files: list[Path]) -> Iterator[str]:
    rooms = {room_of(path) for path in files}
    known = {room for floor in FLOORS for room in floor}
    yield from (f"{room} has no floor" for room in sorted(rooms - known))
    root = [path for path in files if path.parent == PACKAGE]
    if len(rooms) > MOST_ROOMS:
        yield f"{len(rooms)} rooms, at most {MOST_ROOMS}"
    if len(root) > MOST_ROOT_FILES:
        yield f"{len(root)} files in the root of the package, at most {MOST_ROOT_FILES}"


def imports(path: Path) -> Iterator[str]:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    here = room_of(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("ppflow_jax"):
            continue
        names = (
            [node.module] if "." in node.module else [f"ppflow_jax.{a.name}" for a in node.names]
        )
        for name in names:
            there = name.split(".")[1]
            if there != here and floor.get(there, 0) >= floor.get(here, 0):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} imports up: {name}"


def sizes(path: Path) -> Iterator[str]:
    text, name = path.read_text(), str(path.relative_to(PACKAGE))
    if (lines := text.count("\n")) > LONGEST_FILE and name not in TABLES:
        yield f"{name}: {lines} lines, at most {LONGEST_FILE}"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        where = f"{name}:{node.lineno} {node.name}"
        if (lines := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION:
            yield f"{where}: {lines} lines, at most {LONGEST_FUNCTION}"
        a = node.args
        every = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
        if (count := len([arg for arg in every if arg not in ("self", "cls")])) > MOST_PARAMETERS:
            yield f"{where}: {count} parameters, at most {MOST_PARAMETERS}"


if __name__ == "__main__":
    sys.exit(main())
