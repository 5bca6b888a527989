"""The pickle inside a PyTorch file, read by a machine that can only build data.

Python's unpickler calls what the file names. This one has no way to: a name is looked up in the
table of `torch_globals`, nothing is imported and no attribute is ever set. What is not in the table
becomes a placeholder that swallows its arguments, state and items. Every length is checked against
the bytes that are there before it is used.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from typing import Any

from ppflow_jax.convert.placeholder import Placeholder, made_by
from ppflow_jax.convert.torch_globals import (
    Attributes,
    Constructor,
    Ordered,
    broken,
    fill,
    find_global,
    make,
)
from ppflow_jax.convert.torch_tree import check_tree

_MOST_OPCODES = 8 * 2**20  # a training checkpoint of a 675M-parameter model has 0.1 million
_LONGEST_INT = 255  # bytes; the state of a random generator has whole numbers of 17
_LONGEST_LINE = 4096  # of a name or of a number that is written as text


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
        """The next object, of plain data, tensors and placeholders. InputError if it is broken."""
        self.stack, self.marks, self.memo = [], [], {}
        try:
            for _ in range(_MOST_OPCODES):
                code = self._take(1)[0]
                if code == pickle.STOP[0]:
                    break
                if code not in _OPERATIONS:
                    raise broken(
                        f"torch.save never writes the opcode {_OPCODE_NAMES.get(code, hex(code))}"
                    )
                _OPERATIONS[code](self)
            else:
                raise broken(f"it has more than {_MOST_OPCODES} opcodes")
            tree = self.stack.pop()
        except (IndexError, KeyError) as error:
            raise broken("it uses a value that it has not made") from error
        except UnicodeDecodeError as error:
            raise broken("a text is not UTF-8") from error
        check_tree(tree)
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

    def _line(self, encoding: str = "utf-8") -> str:
        end = self.data.find(b"\n", self.position, self.position + _LONGEST_LINE)
        if end < 0:
            raise broken("it ends inside a name")
        return self._take(end + 1 - self.position)[:-1].decode(encoding)

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _push_text(self, layout: str, errors: str = "surrogatepass") -> None:
        self._push(self._take(self._number(layout)).decode(errors=errors))

    def _push_bytes(self, layout: str) -> None:
        self._push(self._take(self._number(layout)))

    def _push_long(self, layout: str) -> None:
        length = self._number(layout)
        if not 0 <= length <= _LONGEST_INT:
            raise broken(f"a whole number of {length} bytes, expected at most {_LONGEST_INT}")
        self._push(int.from_bytes(self._take(length), "little", signed=True))

    def _push_digits(self) -> None:
        line = self._line().removesuffix("L")
        if len(line) > 2 * _LONGEST_INT:
            raise broken(f"a whole number of {len(line)} digits")
        self._push(line == "01" if line in ("00", "01") else int(line))

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
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            return
        if type(target) is not list:
            raise broken("items are appended to something that is not a list")
        target.extend(items)

    def _add_items(self) -> None:
        self._since_mark()
        if not isinstance(self.stack[-1], Placeholder):
            raise broken("items are added to something that is not a set")

    def _dict(self) -> None:
        items = self._since_mark()
        self._push({})
        fill(self.stack[-1], items)

    def _swallow(self, name: str) -> None:
        self._since_mark()
        self._push(made_by(name))

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
        module, name = self._line(), self._line()
        self._push(make(find_global(module, name, self.script), tuple(self._since_mark())))

    def _obj(self) -> None:
        made, *arguments = self._since_mark()
        self._push(make(made, tuple(arguments)))

    def _persistent(self) -> None:
        if self.storage is None:
            raise broken("a storage where none can be")
        self._push(self.storage(self.stack.pop()))

    def _reduce(self) -> None:
        arguments, made = self.stack.pop(), self.stack.pop()
        self._push(make(made, arguments))

    def _new_object(self, named: bool = False) -> None:
        names = self.stack.pop() if named else {}
        arguments, made = self.stack.pop(), self.stack.pop()
        if type(made) is Constructor and made.holder and arguments == () and not names:
            self._push(made.holder())
        elif names and type(made) is Constructor:
            self._push(made_by(made.name))
        else:
            self._push(make(made, arguments))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Attributes and isinstance(state, dict):
            target.update(state)
        elif type(target) not in (Attributes, Ordered, Placeholder):
            raise broken(f"attributes are set on a {type(target).__name__}")


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
        # protocol 0 writes numbers as text
        pickle.INT: lambda m: m._push_digits(),
        pickle.LONG: lambda m: m._push_digits(),
        pickle.FLOAT: lambda m: m._push(float(m._line())),
        pickle.BINFLOAT: lambda m: m._push(m._number(">d")),
        pickle.SHORT_BINUNICODE: lambda m: m._push_text("<B"),
        pickle.UNICODE: lambda m: m._push(m._line("raw-unicode-escape")),
        pickle.BINUNICODE: lambda m: m._push_text("<I"),
        pickle.BINUNICODE8: lambda m: m._push_text("<Q"),
        # Python 2 wrote its str as these two, be it text or bytes
        pickle.SHORT_BINSTRING: lambda m: m._push_text("<B", "backslashreplace"),
        pickle.BINSTRING: lambda m: m._push_text("<I", "backslashreplace"),
        pickle.SHORT_BINBYTES: lambda m: m._push_bytes("<B"),
        pickle.BINBYTES: lambda m: m._push_bytes("<I"),
        pickle.BINBYTES8: lambda m: m._push_bytes("<Q"),
        pickle.BYTEARRAY8: lambda m: m._push_bytes("<Q"),
        pickle.EMPTY_TUPLE: lambda m: m._push(()),
        pickle.TUPLE1: lambda m: m._push_tuple(1),
        pickle.TUPLE2: lambda m: m._push_tuple(2),
        pickle.TUPLE3: lambda m: m._push_tuple(3),
        pickle.TUPLE: lambda m: m._push(tuple(m._since_mark())),
        pickle.EMPTY_LIST: lambda m: m._push([]),
        pickle.EMPTY_DICT: lambda m: m._push({}),
        pickle.LIST: lambda m: m._push(m._since_mark()),
        pickle.DICT: _P._dict,
        pickle.EMPTY_SET: lambda m: m._push(made_by("builtins.set")),
        pickle.ADDITEMS: _P._add_items,
        pickle.FROZENSET: lambda m: m._swallow("builtins.frozenset"),
        pickle.MARK: lambda m: m.marks.append(len(m.stack)),
        pickle.POP: lambda m: m.stack.pop(),
        pickle.POP_MARK: lambda m: m._since_mark(),
        pickle.DUP: lambda m: m._push(m.stack[-1]),
        pickle.APPEND: lambda m: m._append([m.stack.pop()]),
        pickle.APPENDS: lambda m: m._append(m._since_mark()),
        pickle.SETITEM: _P._set_item,
        pickle.SETITEMS: _P._set_items,
        pickle.BINPUT: lambda m: m._remember(m._number("<B")),
        pickle.LONG_BINPUT: lambda m: m._remember(m._number("<I")),
        pickle.MEMOIZE: lambda m: m._remember(len(m.memo)),
        pickle.PUT: lambda m: m._remember(int(m._line())),
        pickle.GET: lambda m: m._push(m.memo[int(m._line())]),
        pickle.BINGET: lambda m: m._push(m.memo[m._number("<B")]),
        pickle.LONG_BINGET: lambda m: m._push(m.memo[m._number("<I")]),
        pickle.GLOBAL: lambda m: m._global(m._line(), m._line()),
        pickle.STACK_GLOBAL: _P._stack_global,
        pickle.INST: _P._inst,
        pickle.OBJ: _P._obj,
        # numbers of a registry of classes that only the writer's Python has
        pickle.EXT1: lambda m: m._push(made_by(f"extension {m._number('<B')}")),
        pickle.EXT2: lambda m: m._push(made_by(f"extension {m._number('<H')}")),
        pickle.EXT4: lambda m: m._push(made_by(f"extension {m._number('<I')}")),
        pickle.BINPERSID: _P._persistent,
        pickle.REDUCE: _P._reduce,
        pickle.NEWOBJ: _P._new_object,
        pickle.NEWOBJ_EX: lambda m: m._new_object(named=True),
        pickle.BUILD: _P._build,
    }.items()
}
_OPCODE_NAMES = {
    code[0]: name
    for name, code in vars(pickle).items()
    if name.isupper() and isinstance(code, bytes) and len(code) == 1
}
