"""Files of other programs, and damaged or malicious versions of them.

Inputs of `reliability.foreign` and of tests. Torch's files are written without torch: `Torch`
pickles a name as a name.
"""

import copy
import io
import json
import pathlib
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

# Replacements for a value in JSON or in hyper-parameters.
SWAPS = {
    "null": None,
    "true": True,
    "list": [],
    "object": {},
    "string": "x",
    "long string": "x" * 100_000,
    "2**70": 2**70,
    "10**400": 10**400,
    "10**9": 10**9,
    "negative": -7,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "nested": [[{"a": [None, [1]]}]],
}
MAY_MEAN = ", another number"  # of the right type: the format cannot show damage


class Name(str):
    """MODULE NAME: pickled as a class or function of that name, which need not exist."""


class Storage(tuple):
    """Pickled as a persistent id."""


class Call(tuple):
    """(Name, arguments): pickled as a call."""


class Torch(pickle._Pickler):
    """Writes the pickle of torch.save and collects the storages of NumPy arrays."""

    dispatch = dict(pickle._Pickler.dispatch)

    def __init__(self, file, protocol=2):
        super().__init__(file, protocol)
        self.storages: list[bytes] = []

    def persistent_id(self, obj):
        return tuple(obj) if isinstance(obj, Storage) else None

    def save_name(self, obj):
        module, name = obj.split(" ")
        self.write(b"c" + module.encode() + b"\n" + name.encode() + b"\n")

    def save_call(self, obj):
        name, args = obj
        self.save(name)
        self.save(tuple(args))
        self.write(pickle.REDUCE)

    def save_array(self, array):
        key = str(len(self.storages))
        array = np.ascontiguousarray(array)
        self.storages.append(array.tobytes())
        storage = Storage(("storage", Name(f"torch {_STORAGES[array.dtype.name]}"), key, "cpu",
                           array.size))  # fmt: skip
        steps = tuple(step // array.itemsize for step in array.strides)
        args = (storage, 0, array.shape, steps, False, {})
        self.save_call((Name("torch._utils _rebuild_tensor_v2"), args))

    dispatch[Name] = save_name
    dispatch[Call] = save_call
    dispatch[np.ndarray] = save_array


_STORAGES = {
    "float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage", "int64": "LongStorage", "int32": "IntStorage",
    "int16": "ShortStorage", "int8": "CharStorage", "uint8": "ByteStorage", "bool": "BoolStorage",
}  # fmt: skip


def write_torch(path: pathlib.Path, content: Any, protocol: int = 2) -> pathlib.Path:
    """A file of torch.save that holds `content`: dicts, lists, scalars, arrays, Calls."""
    out = io.BytesIO()
    torch = Torch(out, protocol)
    torch.dump(content)
    return write_archive(path, out.getvalue(), torch.storages)


def write_archive(path: pathlib.Path, program: bytes, storages=()) -> pathlib.Path:
    """The zip around a pickle, with right checksums."""
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("archive/data.pkl", program)
        zipped.writestr("archive/byteorder", "little")
        for i, storage in enumerate(storages):
            zipped.writestr(f"archive/data/{i}", storage)
        zipped.writestr("archive/version", "3\n")
    return path


def header_of(content: bytes) -> tuple[dict, bytes]:
    """The header and the numbers of a safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def safetensors_of(header: dict, numbers: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


# Damage.


def flipped(content: bytes, rng: random.Random, start=0, stop=None) -> bytes:
    """Flips one bit."""
    stop = len(content) if stop is None else stop
    position, found = rng.randrange(start, stop), bytearray(content)
    found[position] ^= 1 << rng.randrange(8)
    return bytes(found)


def mangled(content: bytes, rng: random.Random) -> bytes:
    """Changes, deletes, repeats or inserts a few bytes, or truncates."""
    found = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(found) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(found):
            found[at] = rng.randrange(256)
        elif kind == 1:
            del found[at : at + rng.randint(1, 20)]
        elif kind == 2:
            found[at:at] = found[at : at + rng.randint(1, 50)]
        elif kind == 3:
            found[at:at] = rng.randbytes(rng.randint(1, 8))
        elif rng.random() < 0.3:
            del found[at:]
    return bytes(found) or b"\0"


_OPCODES = b"(.0125FIJKMLNRSTUVXabcd}eghijlopqrstu\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b])Q2B"
_OPCODES += b"\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96"


def other_opcodes(program: bytes, rng: random.Random) -> bytes:
    """Changes or inserts opcodes of a pickle."""
    import pickletools

    starts = [position for _, _, position in pickletools.genops(program)]
    found = bytearray(program)
    for position in sorted(rng.sample(starts, rng.choice([1, 1, 2, 4])), reverse=True):
        new = rng.choice(_OPCODES)
        if rng.random() < 0.5:
            found[position] = new
        else:
            found[position:position] = bytes([new]) * rng.choice([1, 2, 50])
    return bytes(found)


def paths_of(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of each value in nested dicts and lists."""
    if path:
        yield path
    children = value.items() if isinstance(value, dict) else ()
    children = enumerate(value) if isinstance(value, list) else children
    for key, child in children:
        yield from paths_of(child, (*path, key))


def with_value(value: Any, path: tuple, new: Any) -> Any:
    """A copy with another value at this path."""
    found = copy.deepcopy(value)
    node = found
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = new
    return found


def swapped(value: Any, rng: random.Random) -> tuple[Any, str]:
    """A copy with a value of another type at one path, and a description."""
    path = rng.choice(list(paths_of(value)))
    name = rng.choice(list(SWAPS))
    old = value
    for key in path:
        old = old[key]
    is_number = isinstance(old, int | float) and not isinstance(old, bool)
    other = MAY_MEAN if is_number and name in ("10**9", "2**70") else ""
    return with_value(value, path, SWAPS[name]), f"{'.'.join(map(str, path))} = {name}{other}"


# Malice. Each is a pickle of a few hundred bytes to a few hundred kilobytes.


ONE_TENSOR = (  # of one float32, in storage 0
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00(K\x01t(K\x01t\x89}tR"
)


def _hyper(middle: bytes) -> bytes:
    """{"state_dict": {"a": …}, "hyper_parameters": what `middle` puts on the stack}"""
    state = b"X\x0a\x00\x00\x00state_dict}X\x01\x00\x00\x00a" + ONE_TENSOR + b"s"
    return b"\x80\x02}(" + state + b"X\x10\x00\x00\x00hyper_parameters" + middle + b"u."


def _section(middle: bytes) -> bytes:
    """Hyper-parameters whose algo.name is what `middle` puts on the stack."""
    return b"}X\x04\x00\x00\x00algo}X\x04\x00\x00\x00name" + middle + b"ss"


_BIG = b"(" + b"N" * 100_000 + b"tq\x00"  # a tuple of 100,000, in the memo


def _doubled(times: int) -> bytes:
    return b"K\x01\x85q\x00" + b"0h\x00h\x00\x86q\x00" * times


def _shared(name: bytes, times: int = 2_000) -> bytes:
    """A list of `times` calls, all with one argument of 100,000 items."""
    call = b"c" + name + b"\nh\x00\x85Ra"
    return _BIG + b"0]" + call * times


BOMBS: dict[str, Callable[[], bytes]] = {
    "doubled tuples": lambda: _hyper(_section(_doubled(60))),
    "doubled tuples as a key": lambda: _hyper(b"}" + _doubled(60) + b"Ns"),
    "doubled tuples in a set": lambda: _hyper(b"\x8f(" + _doubled(60) + b"\x90"),
    "set": lambda: _hyper(_shared(b"builtins\nset")),
    "frozenset": lambda: _hyper(_shared(b"__builtin__\nfrozenset")),
    "torch.Size": lambda: _hyper(_shared(b"torch\nSize").replace(b"tq\x00", b"lq\x00", 1)),
    "OrderedDict": lambda: _hyper(_shared(b"collections\nOrderedDict")),
    "_codecs.encode": lambda: _hyper(
        b"X\xa0\x86\x01\x00" + b"x" * 100_000 + b"q\x000]"
        + b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86Ra" * 50_000
    ),
    "arguments of a tensor": lambda: _hyper(
        _BIG + b"0]" + b"ctorch._utils\n_rebuild_tensor_v2\nh\x00Ra" * 50_000
    ),
    "arguments of a storage": lambda: _hyper(_BIG + b"0]" + b"h\x00Qa" * 50_000),
    "long keys": lambda: _hyper(
        b"X\xa0\x86\x01\x00" + b"x" * 100_000 + b"q\x000}" + b"h\x00Ns" * 100_000
    ),
    "keys with one hash": lambda: _hyper(
        b"}(" + b"".join(
            b"\x8a\x09" + (i * (2**61 - 1)).to_bytes(9, "little") + b"N" for i in range(1, 2**11)
        ) * 40 + b"u"
    ),
    "deep lists": lambda: _hyper(b"]" * 100_000 + b"a" * 99_999),
    "deep calls": lambda: _hyper(b"cos\nsystem\n" + b")R" * 200_000),
    "a list in itself": lambda: _hyper(_section(b"]q\x00h\x00a")),
    "empty sets": lambda: _hyper(b"](" + b"\x8f" * 1_000_000 + b"e"),
    "a huge integer": lambda: _hyper(_section(b"\x8b\x40\x0d\x03\x00" + b"\x7f" * 200_000)),
    "a huge text": lambda: _hyper(_section(b"X\x40\x42\x0f\x00" + b"\n" * 1_000_000)),
    "a huge PUT": lambda: _hyper(b"Np" + b"9" * 4000 + b"\n"),
    "a huge BINUNICODE8": lambda: _hyper(b"\x8d" + b"\xff" * 7 + b"\x7f"),
}  # fmt: skip
