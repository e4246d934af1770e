"""What instructions compute in each lane: name → function of typed arrays."""

import re

import ml_dtypes
import numpy as np

TYPES = {
    "pred": np.bool_, "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16,
    "s8": np.int8, "u8": np.uint8, "b8": np.uint8,
    "s16": np.int16, "u16": np.uint16, "b16": np.uint16,
    "s32": np.int32, "u32": np.uint32, "b32": np.uint32,
    "s64": np.int64, "u64": np.uint64, "b64": np.uint64,
}  # fmt: skip
PAIRS = {  # two numbers in 32 bits → type of each; float8 in 16 bits
    "bf16x2": ml_dtypes.bfloat16,
    "f16x2": np.float16,
    "e4m3x2": ml_dtypes.float8_e4m3fn,
}
COMPARE = {  # False for NaN
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
SMALLEST = np.float32(2.0**-126)  # below it, .ftz gives 0


def bits(array, size: int):
    """The same bits as an unsigned integer of `size` bytes; more are zeros, fewer are cut off."""
    array = np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array
    return array.view(f"u{array.dtype.itemsize}").astype(f"u{size}")


def _wide(array):
    return array.astype(f"{array.dtype.kind}{2 * array.dtype.itemsize}")


def multiply(a, b, mode: str):
    if mode == "wide":
        return _wide(a) * _wide(b)
    if mode == "hi":
        return (_wide(a) * _wide(b) >> 8 * a.dtype.itemsize).astype(a.dtype)
    return a * b


def shift(a, by, left: bool):
    """By the number of bits or more: 0, or of signed numbers the sign."""
    width = 8 * a.dtype.itemsize
    by = by.view(np.uint32)
    if a.dtype.kind == "i" and not left:
        return a >> np.minimum(by, width - 1).astype(a.dtype)
    inside = np.minimum(by, width - 1).astype(a.dtype)
    return np.where(by < width, a << inside if left else a >> inside, 0).astype(a.dtype)


def extract(a, at, length):
    width = 8 * a.dtype.itemsize
    (at,), (length,) = set(at.tolist()), set(length.tolist())
    return (a << a.dtype.type(width - at - length)) >> a.dtype.type(width - length)


def permute(a, b, select):
    """prmt: bytes of a and b by index; with bit 3, the sign of the byte."""
    data = [a >> np.uint32(8 * i) & 255 for i in range(4)]
    data = np.stack(np.broadcast_arrays(*data, *(b >> np.uint32(8 * i) & 255 for i in range(4))))
    result = np.zeros(data.shape[1], np.uint32)
    for i in range(4):
        index = np.broadcast_to(select >> np.uint32(4 * i) & 15, result.shape)
        byte = np.take_along_axis(data, (index & 7)[None].astype(int), 0)[0]
        byte = np.where(index & 8, np.where(byte & 128, 255, 0), byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def multiply_add(name: list[str], a, b, c):
    """One rounding (to nearest; .rm: down)."""
    exact = a.astype(np.float64) * b + c
    y = exact.astype(a.dtype)
    if "rm" in name:
        y = np.where(y > exact, np.nextafter(y, np.float32(-np.inf)), y)
    return y


def finish(name: list[str], y):
    """Of float32: .sat limits to [0, 1], .ftz flushes small numbers to 0."""
    if y.dtype == np.float32 and "sat" in name:
        y = np.where(np.isnan(y), np.float32(0), np.clip(y, 0, 1))
    if y.dtype == np.float32 and "ftz" in name:
        y = np.where(np.abs(y) < SMALLEST, np.float32(0), y)
    return y


UNARY = {
    "cvta": lambda a: a,
    "not": lambda a: ~a,
    "neg": lambda a: -a,
    "abs": abs,
    "ex2": lambda a: np.exp2(a.astype(np.float64)).astype(a.dtype),
    "rsqrt": lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(a.dtype),
}
BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "div": lambda a, b: a / b,
    "min": lambda a, b: np.fmin(a, b).astype(a.dtype),
    "max": lambda a, b: np.fmax(a, b).astype(a.dtype),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: shift(a, b, left=True),
    "shr": lambda a, b: shift(a, b, left=False),
}


def compute(name: list[str], get):
    """The result of an instruction; None if it is not known. `get`: (index, type) → the operand
    behind the result as an array of this type."""
    kind, opcode = name[-1], name[0]
    if kind in PAIRS and opcode != "cvt":
        return _of_pairs(name, get)
    with np.errstate(all="ignore"):
        if opcode == "cvt":
            return convert(name, get)
        if opcode in UNARY:
            return finish(name, UNARY[opcode](get(0, kind)))
        if opcode in BINARY:
            second = "b32" if opcode in ("shl", "shr") else kind
            a, b = get(0, kind), get(1, second)
            wide = kind == "bf16"  # NumPy's own arithmetic of it is slow
            a, b = (x.astype(np.float32) for x in (a, b)) if wide else (a, b)
            return finish(name, BINARY[opcode](a, b).astype(TYPES[kind]))
        if opcode == "mul":
            return finish(name, multiply(get(0, kind), get(1, kind), name[1]))
        if opcode == "mad":
            wide = re.sub("16|32", lambda n: str(2 * int(n[0])), kind) if "wide" in name else kind
            return multiply(get(0, kind), get(1, kind), name[1]) + get(2, wide)
        if opcode == "fma":
            return finish(name, multiply_add(name, *(get(i, kind) for i in range(3))))
        if opcode == "bfe":
            return extract(get(0, kind), get(1, "b32"), get(2, "b32"))
        if opcode == "prmt":
            return permute(*(get(i, "b32") for i in range(3)))
        if opcode == "selp":
            return np.where(get(2, "pred"), get(0, kind), get(1, kind))
        if opcode == "setp":
            return COMPARE[name[1]](get(0, kind), get(1, kind))
    return None


def _of_pairs(name: list[str], get):
    """Two results, of the low and the high halves."""
    kind = name[-1].removesuffix("x2")

    def half(i: int):
        def get_half(index: int, kind: str):
            return (get(index, "b32") >> np.uint32(16 * i)).astype(np.uint16).view(TYPES[kind])

        return bits(compute([*name[:-1], kind], get_half), 4)

    return half(0) | half(1) << np.uint32(16)


def convert(name: list[str], get):
    kinds = [part for part in name[1:] if part in TYPES or part in PAIRS or part == "tf32"]
    to, of = kinds
    if to == "tf32":  # of finite numbers, rounded to 10 bits behind the point
        return (get(0, "b32") + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    if of in PAIRS:
        low, high = (get(0, "b16") >> np.uint16(8 * i) & np.uint16(255) for i in (0, 1))
        low, high = (
            half.astype(np.uint8).view(PAIRS[of]).astype(PAIRS[to]) for half in (low, high)
        )
    elif to in PAIRS:
        high, low = (get(i, of).astype(PAIRS[to]) for i in (0, 1))
    else:
        return finish(name, get(0, of).astype(TYPES[to]))
    return bits(low, 4) | bits(high, 4) << np.uint32(16)
