"""Floating-point operations of one matrix product in HLO text: a dot, a convolution, a reduce,
or a call of cuBLAS; and of the products in a call of cuDNN's attention.

The TPU compiler turns each dot into a convolution. Contracted dimensions become input features;
batch dimensions become spatial ones, with strides, padding and dilation such that each output reads
only its own inputs. Taps on padding or between dilated inputs are not counted.
"""

import dataclasses
import math
import re

from esolm_jax.aot.hlo_parse import Computation, Instruction, Shape


def product_flops(instruction: Instruction, computation: Computation) -> int:
    """Multiplications and additions of a matrix product; 0 for any other instruction.

    [M, K] x [K, N] is 2 M K N. Counted as executed: recomputed products count again, and so do
    stored zeros (causal masks, padded batches).
    """
    opcode = instruction.opcode
    if opcode == "reduce":
        return _reduced_product(instruction, computation)
    if opcode == "custom-call" and 'custom_call_target="__cudnn$fmha' in instruction.attributes:
        return _attention(instruction, computation)
    is_cublas = (
        opcode == "custom-call" and 'custom_call_target="__cublas$' in instruction.attributes
    )
    if opcode not in ("dot", "convolution") and not is_cublas:
        return 0
    left, right = (_shape(name, computation) for name in instruction.operands[:2])
    output = instruction.shapes[0]
    if is_cublas:  # as a dot, with its dimensions as JSON
        listed = r'"lhs_contracting_dimensions":\[([^\]]*)\]'
        dims = re.findall(r"\d+", re.search(listed, instruction.attributes)[1])
        return 2 * output.elements * math.prod(left.sizes[int(d)] for d in dims)
    if opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        sizes = [left.sizes[int(d)] for d in contracted[1].split(",") if d] if contracted else []
        return 2 * output.elements * math.prod(sizes)
    return _convolution(instruction, left, right, output)


def _shape(name: str, computation: Computation) -> Shape:
    return computation.instructions[name].shapes[0]


def _reduced_product(instruction: Instruction, computation: Computation) -> int:
    """A matrix times a vector may become multiply and reduce, which keep the dot's op_name. If they
    are in two fusions, as on GPUs, they are not counted."""
    if not instruction.op_name.endswith("dot_general"):
        return 0
    source = computation.instructions[instruction.operands[0]]
    while source.opcode in ("convert", "copy", "bitcast"):
        source = computation.instructions[source.operands[0]]
    return 2 * source.shapes[0].elements if source.opcode == "multiply" else 0


def _attention(instruction: Instruction, computation: Computation) -> int:
    """FLOPs of cuDNN's attention of q [B, T, H, K] and k [B, S, G, K]: two products forward, five
    backward, over all pairs, or over the visible ones with a causal mask."""
    q, k = (_shape(name, computation).sizes for name in instruction.operands[:2])
    rows, queries, heads, width = q
    pairs = rows * heads * queries * k[1]
    if re.search(r'"mask_type":\s*"CAUSAL"', instruction.attributes):
        pairs = rows * heads * queries * (queries + 1) // 2
    target = instruction.attribute("custom_call_target") or ""
    products = 5 if "Backward" in target else 2
    return 2 * products * pairs * width


@dataclasses.dataclass(frozen=True)
class Window:
    """One spatial dimension of a convolution."""

    size: int
    stride: int = 1
    low: int = 0
    lhs_dilate: int = 1
    rhs_dilate: int = 1


def _convolution(instruction: Instruction, left: Shape, right: Shape, output: Shape) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    lhs, rhs, out = labels[1], labels[2], labels[3]
    # right "i" is already the share of one feature group; batch groups shrink the output's batch.
    flops = 2 * output.sizes[out.index("b")] * output.sizes[out.index("f")]
    flops *= right.sizes[rhs.index("i")]
    for d, window in enumerate(_windows(instruction.attributes)):
        label = str(d)
        flops *= _taps(left.sizes[lhs.index(label)], output.sizes[out.index(label)], window)
    return flops


def _windows(attributes: str) -> list[Window]:
    match = re.search(r"window=\{([^}]*)\}", attributes)
    if not match:
        return []
    texts = dict(field.split("=") for field in match[1].split())
    fields = {name: text.split("x") for name, text in texts.items()}
    of = {
        "size": "size",
        "stride": "stride",
        "lhs_dilate": "lhs_dilate",
        "rhs_dilate": "rhs_dilate",
    }
    windows = []
    for d in range(len(fields["size"])):
        values = {key: int(fields[name][d]) for key, name in of.items() if name in fields}
        low = int(fields["pad"][d].split("_")[0]) if "pad" in fields else 0
        windows.append(Window(low=low, **values))
    return windows


def _taps(inputs: int, outputs: int, window: Window) -> int:
    """Pairs (output, kernel element) of one dimension that meet an input element."""
    places = range(0, inputs * window.lhs_dilate, window.lhs_dilate)
    total = 0
    for k in range(window.size):
        first = k * window.rhs_dilate - window.low
        seen = range(first, first + outputs * window.stride, window.stride)
        total += _common(seen, places)
    return total


def _common(a: range, b: range) -> int:
    """The number of integers that two ascending ranges share."""
    if not a or not b:
        return 0
    divisor = math.gcd(a.step, b.step)
    if (b[0] - a[0]) % divisor:
        return 0
    period = a.step * b.step // divisor
    inverse = pow(a.step // divisor, -1, b.step // divisor)
    meet = a[0] + a.step * ((b[0] - a[0]) // divisor * inverse % (b.step // divisor))
    low = max(a[0], b[0])
    first = meet + max(0, -(-(low - meet) // period)) * period
    return max(0, (min(a[-1], b[-1]) - first) // period + 1)
