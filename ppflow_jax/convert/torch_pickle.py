"""The pickle inside a PyTorch file, read by a machine that can only build data.

Python's unpickler calls what the file names. This one has no way to: a name is looked up in the
table of `torch_globals`, nothing is imported, no attribute is ever set, and an opcode that
`torch.save` does not write is refused. Every length is checked against the bytes that are there
before it is used.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from ppflow_jax.convert.tensors import TensorRef, shown
from ppflow_jax.convert.torch_globals import (
    KEYS,
    Attributes,
    Constructor,
    Ordered,
    broken,
    fill,
    find_global,
    refused,
)
from ppflow_jax.errors import InputError

_DEEPEST = 64
_MOST_NODES = 4_000_000
_LONGEST_INT = 16  # bytes; the magic number of the legacy format has 10
_LEAVES = (*KEYS, bytes, np.dtype, TensorRef)


class PickleReader:
    """Reads pickles that follow one another in `data`, from `position` on.

    storage: gives the storage of a persistent id, or raises InputError.
    script: whether the classes of a TorchScript archive may occur.
    """

    def __init__(
        self, data: bytes, storage: Callable[[object], Any] | None = None, script: bool = False
    ):
        self.data, self.position = data, 0
        self.storage, self.script = storage, script
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The next object. Raises InputError for everything that is not plain data."""
        self.stack, self.marks, self.memo = [], [], {}
        try:
            while (code := self._take(1)[0]) != pickle.STOP[0]:
                if code not in _OPERATIONS:
                    raise refused(f"the pickle opcode {_OPCODE_NAMES.get(code, hex(code))}")
                _OPERATIONS[code](self)
            tree = self.stack.pop()
        except (IndexError, KeyError) as error:
            raise broken("it uses a value that it has not made") from error
        except UnicodeDecodeError as error:
            raise broken("a text is not UTF-8") from error
        _check_tree(tree, 0, {})
        return tree

    def _take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise broken(f"it ends early, {end - len(self.data)} bytes are missing")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _line(self) -> str:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise broken("it ends inside a name")
        return self._take(end + 1 - self.position)[:-1].decode()

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _push_text(self, layout: str) -> None:
        self._push(self._take(self._number(layout)).decode())

    def _push_bytes(self, layout: str) -> None:
        self._push(self._take(self._number(layout)))

    def _push_long(self, layout: str) -> None:
        length = self._number(layout)
        if not 0 <= length <= _LONGEST_INT:
            raise broken(f"a whole number of {length} bytes, expected at most {_LONGEST_INT}")
        self._push(int.from_bytes(self._take(length), "little", signed=True))

    def _push_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        self.stack[len(self.stack) - count :] = [tuple(self.stack[len(self.stack) - count :])]

    def _since_mark(self) -> list:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _append(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise broken("items are appended to something that is not a list")
        self.stack[-1].extend(items)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        fill(self.stack[-1], [key, value])

    def _set_items(self) -> None:
        items = self._since_mark()
        fill(self.stack[-1], items)

    def _remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def _global(self, module: object, name: object) -> None:
        self._push(find_global(module, name, self.script))

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._global(module, name)

    def _inst(self) -> None:
        raise refused(shown(f"{self._line()}.{self._line()}"))

    def _persistent(self) -> None:
        if self.storage is None:
            raise broken("a storage where none can be")
        self._push(self.storage(self.stack.pop()))

    def _reduce(self) -> None:
        arguments, made = self.stack.pop(), self.stack.pop()
        if type(made) is not Constructor or made.call is None or type(arguments) is not tuple:
            raise refused(f"a call of {shown(getattr(made, 'name', type(made).__name__))}")
        if made.holder is Attributes and arguments:
            raise broken(f"{made.name} with arguments")
        try:
            value = made.call(*arguments)
        except TypeError as error:
            raise broken(f"{made.name} with {len(arguments)} unfit arguments") from error
        self._push(value)

    def _new_object(self) -> None:
        arguments, made = self.stack.pop(), self.stack.pop()
        if type(made) is not Constructor or made.holder is None or arguments != ():
            raise refused(f"an object of {shown(getattr(made, 'name', type(made).__name__))}")
        self._push(made.holder())

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(state) is not dict or type(target) not in (Attributes, Ordered):
            raise refused(f"attributes set on a {type(target).__name__}")
        for key in state:
            if type(key) is not str or (key.startswith("__") and key.endswith("__")):
                raise refused(f"the attribute {shown(key)}")
        if type(target) is Attributes:
            target.update(state)
        elif set(state) - {"_metadata"}:
            raise refused(f"the attribute {shown(min(state))} on an OrderedDict")


def _check_tree(node: object, depth: int, seen: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Nodes and height of plain data; InputError for cycles, bombs and what is not data.

    A few bytes can describe a tree of billions of nodes by repeating one list in the next:
    nodes are counted as a walk over the tree would meet them.
    """
    if isinstance(node, _LEAVES):
        return 1, 0
    if not isinstance(node, dict | list | tuple):
        raise refused(f"{shown(getattr(node, 'name', type(node).__name__))} as a value")
    if id(node) not in seen:
        count, height = 1, 0
        for child in node.values() if isinstance(node, dict) else node:
            if depth < _DEEPEST:
                below, under = _check_tree(child, depth + 1, seen)
                count, height = count + below, max(height, under + 1)
            else:
                height = _DEEPEST
        seen[id(node)] = count, height
    count, height = seen[id(node)]
    if depth + height > _DEEPEST:
        raise InputError(f"nested deeper than {_DEEPEST} levels or in itself; no checkpoint is")
    if count > _MOST_NODES:
        raise InputError(f"more than {_MOST_NODES} values by repetition; no checkpoint has them")
    return count, height


_P = PickleReader
_OPERATIONS: dict[int, Callable[[PickleReader], Any]] = {
    code[0]: operation
    for code, operation in {
        pickle.PROTO: lambda m: m._take(1),
        pickle.FRAME: lambda m: m._take(8),
        pickle.NONE: lambda m: m._push(None),
        pickle.NEWTRUE: lambda m: m._push(True),
        pickle.NEWFALSE: lambda m: m._push(False),
        pickle.BININT: lambda m: m._push(m._number("<i")),
        pickle.BININT1: lambda m: m._push(m._number("<B")),
        pickle.BININT2: lambda m: m._push(m._number("<H")),
        pickle.LONG1: lambda m: m._push_long("<B"),
        pickle.LONG4: lambda m: m._push_long("<i"),
        pickle.BINFLOAT: lambda m: m._push(m._number(">d")),
        pickle.SHORT_BINUNICODE: lambda m: m._push_text("<B"),
        pickle.BINUNICODE: lambda m: m._push_text("<I"),
        pickle.BINUNICODE8: lambda m: m._push_text("<Q"),
        # Python 2 wrote its str as these two
        pickle.SHORT_BINSTRING: lambda m: m._push_text("<B"),
        pickle.BINSTRING: lambda m: m._push_text("<I"),
        pickle.SHORT_BINBYTES: lambda m: m._push_bytes("<B"),
        pickle.BINBYTES: lambda m: m._push_bytes("<I"),
        pickle.BINBYTES8: lambda m: m._push_bytes("<Q"),
        pickle.EMPTY_TUPLE: lambda m: m._push(()),
        pickle.TUPLE1: lambda m: m._push_tuple(1),
        pickle.TUPLE2: lambda m: m._push_tuple(2),
        pickle.TUPLE3: lambda m: m._push_tuple(3),
        pickle.TUPLE: lambda m: m._push(tuple(m._since_mark())),
        pickle.EMPTY_LIST: lambda m: m._push([]),
        pickle.EMPTY_DICT: lambda m: m._push({}),
        pickle.LIST: lambda m: m._push(m._since_mark()),
        pickle.MARK: lambda m: m.marks.append(len(m.stack)),
        pickle.APPEND: lambda m: m._append([m.stack.pop()]),
        pickle.APPENDS: lambda m: m._append(m._since_mark()),
        pickle.SETITEM: _P._set_item,
        pickle.SETITEMS: _P._set_items,
        pickle.BINPUT: lambda m: m._remember(m._number("<B")),
        pickle.LONG_BINPUT: lambda m: m._remember(m._number("<I")),
        pickle.MEMOIZE: lambda m: m._remember(len(m.memo)),
        pickle.BINGET: lambda m: m._push(m.memo[m._number("<B")]),
        pickle.LONG_BINGET: lambda m: m._push(m.memo[m._number("<I")]),
        pickle.GLOBAL: lambda m: m._global(m._line(), m._line()),
        pickle.STACK_GLOBAL: _P._stack_global,
        pickle.INST: _P._inst,
        pickle.BINPERSID: _P._persistent,
        pickle.REDUCE: _P._reduce,
        pickle.NEWOBJ: _P._new_object,
        pickle.BUILD: _P._build,
    }.items()
}
_OPCODE_NAMES = {
    code[0]: name
    for name, code in vars(pickle).items()
    if name.isupper() and isinstance(code, bytes) and len(code) == 1
}
