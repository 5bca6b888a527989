"""Trees of parameters cut in two by the paths of their leaves, and put together again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Tree = dict[str | int, Any]
Path = tuple[str | int, ...]


def split(tree: Tree, patterns: Iterable[str]) -> tuple[Tree, Tree]:
    """The leaves whose whole path (`blocks/fc1/kernel`) matches one of `patterns`, and the others.

    Both are trees without empty branches; arrays are not copied.
    """
    compiled = [re.compile(pattern) for pattern in patterns]
    return parted(tree, lambda path: any(p.fullmatch(joined(path)) for p in compiled))


def parted(tree: Tree, chosen: Callable[[Path], bool]) -> tuple[Tree, Tree]:
    """The leaves whose paths are `chosen`, and the others; see `split`."""
    trees: tuple[Tree, Tree] = ({}, {})
    for path, leaf in leaves(tree):
        put(trees[not chosen(path)], path, leaf)
    return trees


def join(a: Tree, b: Tree) -> Tree:
    """One tree with the leaves of both, in the order of `a` where it has them.

    Raises:
      ValueError: a leaf that is in both.
    """
    out = dict(a)
    for name, part in b.items():
        if name not in a:
            out[name] = part
        elif isinstance(part, dict) and isinstance(a[name], dict):
            out[name] = join(a[name], part)
        else:
            raise ValueError(f"{name!r} is in both trees")
    return out


def leaves(tree: Tree, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Path and leaf, in the order of the tree."""
    for name, part in tree.items():
        if isinstance(part, dict):
            yield from leaves(part, (*path, name))
        else:
            yield (*path, name), part


def joined(path: Path) -> str:
    """A path as patterns see it: `blocks/fc1/kernel`."""
    return "/".join(map(str, path))


def at(tree: Tree, path: Path) -> Any:
    """The leaf or branch at `path`."""
    for name in path:
        tree = tree[name]
    return tree


def put(tree: Tree, path: Path, leaf: Any) -> None:
    """Make `leaf` the one at `path`, in place."""
    *parents, last = path
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = leaf
