"""Where in a file a model is: wrappers removed from names, and one of several models chosen.

A name such as `ema.module.blocks.0._orig_mod.attn.qkv.weight` is read from the right: what looks
like the name of a known model is one, and what stands before it is its prefix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ppflow_jax.convert.known import (
    ADD_ONS,
    BOOKKEEPING,
    KNOWN,
    NO_WEIGHTS,
    OWNERS,
    WRAPPERS,
    Known,
    is_ema,
)
from ppflow_jax.convert.tensors import shown
from ppflow_jax.errors import InputError

_REMOVED = WRAPPERS | OWNERS
_MOST_SHOWN = 6
_MOST_PARTS = 64  # of a name that is looked at

Path = tuple[str, ...]


class NoModel(InputError):
    """What is asked for is not among the tensors."""


@dataclass(frozen=True)
class Wanted:
    """What the user asks for; None where nothing is said.

    Attributes:
      family: of models, see `Known`.
      weights: ema or model.
      entry: path in the file that the model is somewhere under.
      prefix: what every name of the model begins with, below `entry`; "" for nothing.
    """

    family: str | None = None
    weights: str | None = None
    entry: str | None = None
    prefix: str | None = None

    @property
    def path(self) -> Path:
        text = f"{self.entry or ''}.{self.prefix or ''}"
        return tuple(part for part in text.split(".") if part)


@dataclass(frozen=True)
class Choice:
    """One model of a file.

    Attributes:
      family: see `Known`.
      prefix: of its names in the file.
      names: (index of the name in the file, name of the model's tensor).
      left_out: what is not the model's, with the number of tensors.
      removed: wrappers that were removed inside its names or before them.
    """

    family: str
    prefix: str
    names: list[tuple[int, str]]
    left_out: Counter
    removed: list[str]


@dataclass(eq=False)
class _Group:
    """The tensors that look like one model's: where they begin, and their names from there."""

    known: Known
    prefixes: set[Path] = field(default_factory=set)
    names: set[str] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        return all(any(map(need.match, self.names)) for need in self.known.needed)

    @property
    def prefix(self) -> Path:
        return min(self.prefixes, key=lambda path: (len(path), path))

    @property
    def ema(self) -> bool:
        return is_ema(self.prefix)


def choose(names: Sequence[str], wanted: Wanted) -> Choice:
    """The model among the names of a file.

    Raises:
      NoModel: there is none.
      InputError: there are several that are equally good.
    """
    paths = [tuple(name.split(".")) for name in names]
    base = wanted.path
    asked = [path[: len(base)] == base for path in paths]
    if not any(asked):
        raise NoModel(
            f"no tensor's name begins with {shown('.'.join(base))!r}: change --entry or --prefix; "
            f"the file has {_listed(path[0] for path in paths)}"
        )
    found = {i: begin for i, path in enumerate(paths) if asked[i] and (begin := _begin(path))}
    found = {
        i: (start, known)
        for i, (start, known) in found.items()
        if start >= len(base)
        and (wanted.prefix is None or not set(paths[i][len(base) : start]) - WRAPPERS)
    }
    # Prefixes that differ in wrappers only are one; where no model is whole then, in owners too.
    owned = frozenset(part for part in _REMOVED if not is_ema((part,)))
    ways = [_groups(paths, found, removed) for removed in (WRAPPERS, owned, _REMOVED)]
    groups = next((way for way in ways if any(g.complete for g in way.values())), ways[0])
    group = _best(list(set(groups.values())), wanted, [n for n, a in zip(names, asked) if a])
    return _choice(paths, asked, group, groups)


def _begin(path: Path) -> tuple[int, Known] | None:
    """Where the name of a known model begins in a path, and of which."""
    for start in range(len(path) if len(path) <= _MOST_PARTS else 0):
        if path[start] in NO_WEIGHTS:
            return None
        if path[start] in _REMOVED:
            continue
        name = _without(path[start:])
        for known in KNOWN:
            if known.names.fullmatch(name):
                return start, known
    return None


def _without(path: Path) -> str:
    return ".".join(part for part in path if part not in _REMOVED)


def _groups(
    paths: list[Path], found: dict[int, tuple[int, Known]], removed: frozenset[str]
) -> dict[int, _Group]:
    """The group of every name in `found`: those whose prefixes are the same but for `removed`."""
    by_key: dict[tuple, _Group] = {}
    groups = {}
    for i, (start, known) in found.items():
        key = tuple(part for part in paths[i][:start] if part not in removed)
        group = by_key.setdefault((known, key), _Group(known))
        group.prefixes.add(paths[i][:start])
        group.names.add(_without(paths[i][start:]))
        groups[i] = group
    return groups


def _best(groups: list[_Group], wanted: Wanted, names: list[str]) -> _Group:
    """The group that is asked for: a complete one, of an EMA if there is one."""
    groups = sorted(groups, key=lambda group: group.prefix)
    fitting = [g for g in groups if wanted.family in (None, g.known.family)]
    if not groups:
        raise NoModel(
            "is none of SiT, PPFlow, DiCo, AutoencoderKL, TAESD, Inception; its first names: "
            f"{', '.join(map(shown, names[:4]))}"
        )
    if not fitting:
        raise InputError(f"has no {wanted.family}, it has {_described(groups)}: change --kind")
    most = max(len(g.names) for g in fitting)
    whole = [g for g in fitting if g.complete] or [g for g in fitting if len(g.names) == most]
    if wanted.weights:
        chosen = [g for g in whole if g.ema == (wanted.weights == "ema")]
        if not chosen:
            raise NoModel(
                f"has no {wanted.weights!r} weights, it has {_described(whole)}: change --weights"
            )
        whole = chosen
    families = {g.known.family for g in whole}
    if len(families) > 1:
        kinds = " or ".join(f"--kind={family}" for family in sorted(families))
        raise InputError(f"has {_described(whole)}: say which with {kinds}")
    averaged = [g for g in whole if g.ema] or whole
    if len(averaged) > 1:
        flags = " or ".join(
            f"--entry={'.'.join(g.prefix)}" if g.prefix else "--prefix= (nothing)" for g in averaged
        )
        raise InputError(f"has {_described(averaged)}: say which with {flags}")
    return averaged[0]


def _described(groups: Iterable[_Group]) -> str:
    where = {g: f"in {shown('.'.join(g.prefix))}" if g.prefix else "without prefix" for g in groups}
    return " and ".join(f"a {group.known.family} {place}" for group, place in where.items())


def _choice(
    paths: list[Path], asked: list[bool], group: _Group, groups: dict[int, _Group]
) -> Choice:
    """Which names belong to a group; everything else is left out."""
    prefixes = sorted(group.prefixes, key=len, reverse=True)
    others = {g for g in groups.values() if g is not group and g.complete}
    nested = [p for g in others for p in g.prefixes]
    names, removed, left_out = [], {}, Counter()
    for i, path in enumerate(paths):
        own = next((p for p in prefixes if path[: len(p)] == p), None)
        rest = path[len(own) :] if own is not None else ()
        outside = own is None or not asked[i] or groups.get(i) in others
        outside = outside or any(len(p) > len(own) and path[: len(p)] == p for p in nested)
        if outside or _beside(rest, group):
            left_out[_label(path, group.prefix)] += 1
            continue
        removed |= dict.fromkeys(part for part in path if part in _REMOVED)
        names.append((i, group.known.root + _without(rest)))
    return Choice(group.known.family, ".".join(group.prefix), names, left_out, list(removed))


def _beside(rest: Path, group: _Group) -> bool:
    """Whether this is no weight of the model, though it is saved among them."""
    first = next((part for part in rest if part not in WRAPPERS), "")
    return (
        first in NO_WEIGHTS
        or (is_ema((first,)) and first not in _REMOVED)
        or (_without(rest) in BOOKKEEPING)
        or (group.known.family == "sit" and first in ADD_ONS)
    )


def _label(path: Path, prefix: Path) -> str:
    """A short name for what is left out: its path down to where it leaves the model's."""
    same = next((i for i, (a, b) in enumerate(zip(path, prefix)) if a != b), None)
    depth = min(len(path), len(prefix)) if same is None else same
    return ".".join(path[: depth + 1])


def _listed(names: Iterable[str]) -> str:
    """Some names, each once."""
    names = list(dict.fromkeys(map(shown, names)))
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(names[:_MOST_SHOWN]) + more
