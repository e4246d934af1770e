"""Reads the pickles of `torch.save` without unpickling: nothing in the file is ever called.

A pickle is a program. Python's unpickler imports the names in the program and calls them. This
reader interprets the program on its own stack, where a name is only a pair of strings. It builds
plain containers and tensors, within a budget (budget.py). Any other object becomes an inert
`Object` that keeps its class, arguments and state, because checkpoints may hold unneeded objects.
"""

import pickletools
import struct
import sys
from collections.abc import Callable
from typing import Any

from esolm_jax.errors import UserError, brief
from esolm_jax.interop.torch_file.budget import Budget
from esolm_jax.interop.torch_file.objects import MOST_ARGS, Builder, Name, Object, Rebuild


def load(data: bytes, storage: Callable[..., Any], tensors: dict[str, Rebuild], where: str) -> Any:
    """The object that `data` describes.

    Args:
      storage: from the content of a persistent id to the object for the stack.
      tensors: functions that build a tensor, by name in torch._utils.
      where: names the file in errors.

    Raises:
      UserError: the pickle is damaged, or exceeds the budget.
    """
    rebuild = {("torch._utils", name): make for name, make in tensors.items()}
    budget = Budget(len(data), where)
    machine = _Machine(storage, Builder(rebuild, budget.charge), where, budget)
    try:
        for opcode, arg, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.run(opcode.name, arg)
    except UserError:
        raise
    except (
        ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError,
        ValueError, struct.error,
    ) as error:  # fmt: skip
        raise UserError(f"{where}: damaged, or no checkpoint: {brief(error)}") from error
    raise UserError(f"{where}: damaged: its pickle has no end")


class _Machine:
    """The stack and the memo; one method for each kind of opcode."""

    def __init__(self, storage, builder: Builder, where: str, budget: Budget):
        self.storage, self.builder, self.where = storage, builder, where
        self.charge = budget.charge
        self.stack: list = []
        self.marks: list[list] = []  # the stacks below the marks
        self.memo: dict[int, Any] = {}

    def run(self, opcode: str, arg) -> None:
        self.charge(_COSTS.get(opcode, _COST) + (0 if arg is None else sys.getsizeof(arg)))
        if opcode in _LITERALS:
            self.stack.append(arg)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode]())
        elif opcode in _TUPLES:
            count = _TUPLES[opcode]
            items = [self.stack.pop() for _ in range(count)]
            self.stack.append(tuple(reversed(items)))
        elif opcode not in _IGNORED:
            method = _METHODS.get(opcode)
            if method is None:
                raise UserError(f"{self.where}: refused: pickle opcode {opcode}")
            method(self, arg)

    def name(self, module, name) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("a name that is not a string")
        self.stack.append(Name(module, name))

    def global_(self, arg) -> None:
        self.name(*arg.split(" ", 1))

    def stack_global(self, _) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(module, name)

    def reduce(self, _) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        if not (isinstance(kind, Name | Object) and isinstance(args, tuple)):
            raise ValueError(f"a {type(kind).__name__} is called")
        if isinstance(kind, Object):  # the result of a call is called
            self.stack.append(Object(kind.kind, args))
        else:
            self.stack.append(self.builder.call(kind, args))

    def newobj_ex(self, _) -> None:
        self.stack.pop()  # keyword arguments
        self.reduce(_)

    def build(self, _) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Object):
            target.state = state
        elif not isinstance(target, dict | list | set):  # their attributes are ignored
            raise ValueError(f"a {type(target).__name__} gets a state")

    def persistent_id(self, _) -> None:
        args = self.stack.pop()
        if not isinstance(args, tuple) or len(args) > MOST_ARGS:
            raise ValueError("an unknown kind of persistent id")
        self.stack.append(self.storage(*args))

    def mark(self, _) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def to_mark(self) -> list:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def pop(self, _) -> None:
        self.stack.pop() if self.stack else self.to_mark()

    def pop_mark(self, _) -> None:
        self.to_mark()

    def tuple_(self, _) -> None:
        items = self.to_mark()
        self.stack.append(tuple(items))

    def list_(self, _) -> None:
        items = self.to_mark()
        self.stack.append(items)

    def dict_(self, _) -> None:
        items = self.to_mark()
        self.stack.append(self.builder.make_dict(zip(items[::2], items[1::2], strict=True)))

    def frozenset_(self, _) -> None:
        items = self.to_mark()
        self.stack.append(self.builder.make_set(items))

    def append(self, _) -> None:
        item = self.stack.pop()
        self._extend([item])

    def appends(self, _) -> None:
        self._extend(self.to_mark())

    def _extend(self, items: list) -> None:
        target = self.stack[-1]
        if isinstance(target, Object):
            target.items = target = [] if target.items is None else target.items
        if not isinstance(target, list):
            raise ValueError(f"a {type(target).__name__} is appended to")
        target += items

    def additems(self, _) -> None:
        items = self.to_mark()
        if isinstance(self.stack[-1], Object):
            self._extend(items)
        else:
            self.stack[-1].update(self.builder.make_set(items))

    def setitem(self, _) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def setitems(self, _) -> None:
        self._update(self.to_mark())

    def _update(self, items: list) -> None:
        target = self.stack[-1]
        if isinstance(target, Object):
            target.entries = target = {} if target.entries is None else target.entries
        if not isinstance(target, dict):
            raise ValueError(f"a {type(target).__name__} gets items")
        target.update(self.builder.make_dict(zip(items[::2], items[1::2], strict=True)))

    def put(self, index) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index) -> None:
        self.stack.append(self.memo[index])

    def dup(self, _) -> None:
        self.stack.append(self.stack[-1])


_LITERALS = {
    "BINFLOAT", "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
_COST = 40  # bytes of an opcode's result
_COSTS = {"EMPTY_SET": 220, "FROZENSET": 220, "EMPTY_DICT": 64, "DICT": 64, "MARK": 64}
_COSTS |= {"REDUCE": 160, "NEWOBJ": 160, "NEWOBJ_EX": 160, "GLOBAL": 160, "STACK_GLOBAL": 160}
_COSTS |= dict.fromkeys(("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE", "SETITEM", "SETITEMS"), 120)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = {"PROTO", "FRAME"}
_METHODS = {
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.newobj_ex,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent_id,
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "TUPLE": _Machine.tuple_,
    "LIST": _Machine.list_,
    "DICT": _Machine.dict_,
    "FROZENSET": _Machine.frozenset_,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.additems,
    "SETITEM": _Machine.setitem,
    "SETITEMS": _Machine.setitems,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "PUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GET": _Machine.get,
    "DUP": _Machine.dup,
}
