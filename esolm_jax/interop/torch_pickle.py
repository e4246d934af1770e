"""What `torch.save` pickled, read without unpickling it: nothing in the file is ever called.

A pickle is a program. Python's unpickler imports the names that the program gives and calls them;
this reader runs the program on a stack of its own, where a name is but a pair of strings. Plain
containers and tensors are built here; objects of the libraries that a published checkpoint
mentions become inert `Object`s that keep what the file said about them; every other name is
refused.
"""

import dataclasses
import pickletools
import struct
from collections.abc import Callable
from typing import Any

from esolm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Name:
    """A name that the file gives; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return ascii(f"{self.module}.{self.name}"[:100])[1:-1]


class Object:
    """What the file says of an object that is not built: its class, arguments and state."""

    def __init__(self, kind: Name, args: tuple):
        self.kind, self.args = kind, args
        self.state: Any = None
        self.items: list = []  # if it is a list
        self.entries: dict = {}  # if it is a dict


Rebuild = Callable[..., Any]

_TYPES = ("bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "long")
_TYPES += ("object", "set", "slice", "str", "tuple")
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")
_INERT_NAMES = {
    "__builtin__": _TYPES,
    "builtins": _TYPES,
    "argparse": ("Namespace",),
    "collections": ("OrderedDict", "defaultdict", "deque", "Counter"),
    "dataloader": ("Text8Tokenizer", "SyntheticTokenizer"),  # of the published code
    "numpy": ("dtype",),
    "numpy.core.multiarray": ("scalar",),
    "numpy._core.multiarray": ("scalar",),
    "torch": (*(f"{s}Storage" for s in _STORAGES), *_DTYPES, "bool", "device", "Size", "Tensor"),
    "torch.nn.parameter": ("Parameter",),
    "torch.storage": ("UntypedStorage",),
    "torch.torch_version": ("TorchVersion",),
}
_INERT_PACKAGES = ("lightning", "lightning_fabric", "omegaconf", "pathlib", "pytorch_lightning")
_INERT_PACKAGES += ("tokenizers", "torchmetrics", "transformers", "typing")
_SCALARS = (str, int, float, bool, bytes, Name, type(None))


def _hashable(value):
    """Keys are scalars or flat tuples of them: hashing what is nested deeper could crash."""
    flat = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(part, _SCALARS) for part in flat):
        raise ValueError(f"a {type(value).__name__} as a key")
    return value


def _set(items=()):
    return {_hashable(item) for item in items}


def _dict(pairs=()):
    return {_hashable(key): value for key, value in pairs}


_BUILT: dict[tuple[str, str], Rebuild] = {
    ("collections", "OrderedDict"): _dict,
    ("collections", "defaultdict"): lambda *_: {},
    ("torch", "Size"): tuple,
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
    ("__builtin__", "set"): _set,
    ("builtins", "set"): _set,
    ("__builtin__", "frozenset"): _set,
    ("builtins", "frozenset"): _set,
}


def load(data: bytes, storage: Callable[..., Any], tensors: dict[str, Rebuild], where: str) -> Any:
    """The object that `data` describes.

    Args:
      storage: called with what a persistent id holds; what it returns goes on the stack.
      tensors: by name in torch._utils, what builds a tensor.
      where: names the file in errors.

    Raises:
      UserError: the pickle is damaged, or names what is not on the list of what may be mentioned.
    """
    built = _BUILT | {("torch._utils", name): make for name, make in tensors.items()}
    machine = _Machine(storage, built, where)
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
        what = ascii(f"{type(error).__name__}: {error}"[:200])[1:-1]
        raise UserError(f"{where}: damaged, or no checkpoint: {what}") from error
    raise UserError(f"{where}: damaged: its pickle has no end")


class _Machine:
    """The stack and the memo; one method for each kind of opcode."""

    def __init__(self, storage, built, where):
        self.storage, self.built, self.where = storage, built, where
        self.stack: list = []
        self.marks: list[list] = []  # the stacks below the marks
        self.memo: dict[int, Any] = {}

    def run(self, opcode: str, arg) -> None:
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
        found = Name(module, name)
        package = module.split(".")[0]
        if not (
            (module, name) in self.built
            or name in _INERT_NAMES.get(module, ())
            or package in _INERT_PACKAGES
        ):
            raise UserError(
                f"{self.where}: refused, nothing was run: it names {found}, which is neither "
                "a tensor nor a plain container"
            )
        self.stack.append(found)

    def global_(self, arg) -> None:
        self.name(*arg.split(" ", 1))

    def stack_global(self, _) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(module, name)

    def reduce(self, _) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        if not (isinstance(kind, Name) and isinstance(args, tuple)):
            raise ValueError(f"a {type(kind).__name__} is called")
        make = self.built.get((kind.module, kind.name))
        self.stack.append(make(*args) if make else Object(kind, args))

    def newobj_ex(self, _) -> None:
        self.stack.pop()  # keyword arguments
        self.reduce(_)

    def build(self, _) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Object):
            target.state = state
        elif not isinstance(target, dict):  # a state_dict has attributes; they do not matter
            raise ValueError(f"a {type(target).__name__} gets a state")

    def persistent_id(self, _) -> None:
        self.stack.append(self.storage(*self.stack.pop()))

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
        self.stack.append(_dict(zip(items[::2], items[1::2], strict=True)))

    def frozenset_(self, _) -> None:
        items = self.to_mark()
        self.stack.append(_set(items))

    def append(self, _) -> None:
        item = self.stack.pop()
        self._extend([item])

    def appends(self, _) -> None:
        self._extend(self.to_mark())

    def _extend(self, items: list) -> None:
        target = self.stack[-1]
        target = target.items if isinstance(target, Object) else target
        if not isinstance(target, list):
            raise ValueError(f"a {type(target).__name__} is appended to")
        target += items

    def additems(self, _) -> None:
        items = self.to_mark()
        self.stack[-1].update(_set(items))

    def setitem(self, _) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def setitems(self, _) -> None:
        self._update(self.to_mark())

    def _update(self, items: list) -> None:
        target = self.stack[-1]
        target = target.entries if isinstance(target, Object) else target
        if not isinstance(target, dict):
            raise ValueError(f"a {type(target).__name__} gets items")
        target.update(_dict(zip(items[::2], items[1::2], strict=True)))

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
