"""Matrix products of warps (mma) and of four warps together (wgmma), and their loads and stores.

A fragment is how the lanes of a warp hold a matrix: lane / 4 names a row, lane % 4 columns.
"""

import ml_dtypes
import numpy as np

from ptx.memory import EVERY
from ptx.program import names

LANE = np.arange(32)
ROW, PAIR = LANE // 4, 2 * (LANE % 4)
TF32 = np.uint32(0xFFFFE000)  # the bits of float32 that it has
SWIZZLES = {1: (128, 7), 2: (64, 3), 3: (32, 1)}  # mode: bytes of a row, bits of its address


def _numbers(words, kind: str):
    """float32 [..., numbers in a word] of 32-bit words."""
    if kind == "tf32":
        return (words & TF32).view(np.float32)[..., None]
    halves = np.ascontiguousarray(words)[..., None].view(np.uint16)
    return halves.view(ml_dtypes.bfloat16).astype(np.float32)


def _kind(name: list[str]) -> str:
    (kind,) = {"bf16", "tf32"} & set(name)
    return kind


def _operand(machine, vector: str, kind: str, tiles: int = 2):
    """A matrix in registers, of this many tiles of 8 rows: [warps, rows, terms]. The first
    registers, one for each tile, have the first half of the terms."""
    words = [machine.warps(name) for name in names(vector)]
    half = 4 if kind == "tf32" else 8
    matrix = np.zeros((len(words[0]), 8 * tiles, 2 * half), np.float32)
    for i, word in enumerate(words):
        numbers = _numbers(word, kind)
        for j in range(numbers.shape[-1]):
            term = (LANE % 4 if kind == "tf32" else PAIR) + j + half * (i // tiles)
            matrix[:, ROW + 8 * (i % tiles), term] = numbers[..., j]
    return matrix


def _put_result(machine, vector: str, product, old) -> None:
    """product [warps, 16, columns] + old: of each 8 columns, registers 0 and 1 have rows 0 to 7."""
    for i, name in enumerate(names(vector)):
        value = product[:, ROW + 8 * (i // 2 % 2), 8 * (i // 4) + PAIR + i % 2]
        machine.put(name, (value + old[i]).astype(np.float32).reshape(-1))


def mma(machine, name, operands) -> None:
    """D = A · B + C of each warp, [16, terms] · [terms, 8]."""
    result, left, right, old = operands
    kind = _kind(name)
    machine.whole_warps()
    a, b = _operand(machine, left, kind), _operand(machine, right, kind, tiles=1)
    product = a @ b.swapaxes(1, 2)
    _put_result(machine, result, product, [machine.warps(name, "f32") for name in names(old)])


def wgmma(machine, name, operands) -> None:
    """D = A · B (+ D) of four warps, [64, terms] · [terms, columns]; B, and A or not, in shared
    memory. The product is done at once, and so waiting for it has no effect."""
    if name[1] != "mma_async":
        return
    kind, (columns, terms) = _kind(name), map(int, name[4].removeprefix("m64n").split("k"))
    result, left, right, adds, sign_a, sign_b, *transposed = operands
    assert sign_a == sign_b == "1"
    if left.startswith("{"):
        a = _operand(machine, left, kind).reshape(-1, 64, terms)
    else:
        a = _described(machine, left, 64, terms, kind, transposed[0] == "1")
    b = _described(machine, right, columns, terms, kind, transposed[-1:] == ["1"])
    product = (a @ b.swapaxes(1, 2)).reshape(-1, 16, columns)
    adds = machine.warps(adds, "pred")
    old = [np.where(adds, machine.warps(name, "f32"), 0) for name in names(result)]
    _put_result(machine, result, product, old)


def _described(machine, operand: str, rows: int, terms: int, kind: str, transposed: bool):
    """The matrix in shared memory that a descriptor describes: [groups of four warps, rows, terms].

    The descriptor has the address, the distances of the next tile (leading and stride), and how
    addresses of 16 bytes are swizzled, in units of 16 bytes.
    """
    described = machine.every(operand, "b64").reshape(-1, 128)[:, 0]
    start, leading, stride = (
        (described >> np.uint64(bit) & np.uint64(0x3FFF)).astype(int)[:, None, None] * 16
        for bit in (0, 16, 32)
    )
    active = machine.whole_warps(128)
    (mode,) = set((described[active] >> np.uint64(62)).tolist())
    span, mask = SWIZZLES[mode]
    size = 4 if kind == "tf32" else 2
    row, term = np.arange(rows)[:, None], np.arange(terms)[None]
    if transposed:
        in_row, per_row = row * size % span, span // size
        offset = in_row + term % 8 * span + term // 8 * stride + row // per_row * leading
    else:
        offset = row % 8 * span + row // 8 * stride + term * size
    address = (start + offset)[active]
    address ^= (address >> 7 & mask) << 4
    local = machine.local.reshape(-1, 128)[active, 0]
    local = np.broadcast_to(local[:, None, None], address.shape).reshape(-1)
    data = machine.shared.load(address.reshape(-1), size, local, np.full(local.size, EVERY))
    found = np.zeros((len(active), rows, terms), np.float32)
    if kind == "tf32":
        numbers = (data.view(np.uint32) & TF32).view(np.float32)
    else:
        numbers = data.view(ml_dtypes.bfloat16).astype(np.float32)
    found[active] = numbers.reshape(address.shape)
    return found


def _rows_of_tiles(machine, name, address: str):
    """(address of each row of each 8 x 8 tile [tiles, warps that load, 8]; program and warp of
    each; which warps load)"""
    tiles = int(next(part for part in name if part in ("x1", "x2", "x4"))[1:])
    active = machine.whole_warps()
    rows = machine.address(address).reshape(-1, 4, 8)[active, :tiles].swapaxes(0, 1)
    local = machine.local.reshape(-1, 32)[active, 0].repeat(8)
    warp = np.flatnonzero(active).repeat(8)
    for of_tile in rows:
        machine.shared.count(of_tile.reshape(-1), 16, np.arange(of_tile.size) // 8)
    return rows, (local, warp), active


def ldmatrix(machine, name, operands) -> None:
    """Tiles of 8 x 8 numbers of 16 bits: lanes give the addresses of rows, and get two numbers."""
    rows, owners, active = _rows_of_tiles(machine, name, operands[1])
    for target, of_tile in zip(names(operands[0]), rows, strict=True):
        data = machine.shared.load(of_tile.reshape(-1), 16, *owners)
        tiles = data.view(np.uint16).reshape(-1, 8, 8)
        tiles = tiles.swapaxes(1, 2) if "trans" in name else tiles
        value = np.zeros((len(active), 32), np.uint32)
        value[active] = np.ascontiguousarray(tiles).view(np.uint32).reshape(-1, 32)
        machine.put(target, value.reshape(-1))


def stmatrix(machine, name, operands) -> None:
    """The reverse of ldmatrix."""
    rows, owners, active = _rows_of_tiles(machine, name, operands[0])
    for source, of_tile in zip(names(operands[1]), rows, strict=True):
        words = np.ascontiguousarray(machine.warps(source)[active])
        tiles = words.view(np.uint16).reshape(-1, 8, 8)
        tiles = np.ascontiguousarray(tiles.swapaxes(1, 2) if "trans" in name else tiles)
        machine.shared.store(of_tile.reshape(-1), tiles.view(np.uint8).reshape(-1, 16), *owners)


INSTRUCTIONS = {"mma": mma, "wgmma": wgmma, "ldmatrix": ldmatrix, "stmatrix": stmatrix}
