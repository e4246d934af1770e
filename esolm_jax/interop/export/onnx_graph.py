"""The plain transformer as an ONNX graph, node by node as in shipped/plain_transformer.py.

Its weights are external data: byte ranges of the safetensors file in the same folder. float16
weights are multiplied in float16 and have a float16 cache; bfloat16 weights and int8 codes are
converted to float32 by nodes of the graph, because runtimes lack their products.
"""

import math
import pathlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from esolm_jax.interop import safetensors_file
from esolm_jax.interop.export.shipped.plain_transformer import (
    EMPTY_RANK,
    MASKED,
    PARTS,
    SCALE,
)
from esolm_jax.interop.export.signatures import Array, Signature

OPSET = 20  # onnxruntime 1.17 and newer (Gelu)
IR_VERSION = 9  # the newest that onnxruntime 1.17 reads
_TYPES = {
    "F32": TensorProto.FLOAT,
    "F16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "I8": TensorProto.INT8,
}


class Graph:
    """A graph under construction. Arrays are identified by name."""

    def __init__(self, weights: pathlib.Path):
        self.file = weights.name
        self.tensors = safetensors_file.entries(weights)
        self.unused = set(self.tensors)
        self.nodes: list = []
        self.initializers: dict = {}

    def __call__(self, op: str, *inputs, **attributes) -> str:
        """A node of one output. Inputs are names, or numpy arrays: constants."""
        name = f"{op.lower()}_{len(self.nodes)}"
        inputs = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def constant(self, array) -> str:
        array = np.asarray(array)
        name = f"constant_{array.dtype}_{array.shape}_{array.tolist()}".replace(" ", "")
        self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def stored(self, name: str) -> str | None:
        """A kernel [D, …] as a matrix [D, _], a bias or scale as a vector, other weights unchanged,
        as they are stored; None if the model lacks it."""
        if name not in self.tensors:
            return None
        entry = self.tensors[name]
        size, shape = math.prod(entry.shape), entry.shape
        is_vector = len(shape) == 1 or name.endswith(("_bias", SCALE)) and "qk_norm" not in name
        dims = (size,) if is_vector else (shape[0], size // shape[0])
        initializer = f"weights.{name}"
        tensor = TensorProto(name=initializer, dims=dims, data_type=_TYPES[entry.dtype])
        tensor.data_location = TensorProto.EXTERNAL
        about = {
            "location": self.file,
            "offset": entry.start,
            "length": entry.stop - entry.start,
        }
        for key, value in about.items():
            tensor.external_data.add(key=key, value=str(value))
        self.initializers[initializer] = tensor
        self.unused.discard(name)
        return initializer

    def float32(self, x: str) -> str:
        return self("Cast", x, to=TensorProto.FLOAT)

    @property
    def is_half(self) -> bool:
        """Whether products are of float16."""
        return self.tensors["logits"].dtype == "F16"

    def matmul(self, a: str, b: str) -> str:
        """float32 a @ b; float16 operands if weights are."""
        if not self.is_half:
            return self("MatMul", a, b)
        half = TensorProto.FLOAT16
        return self.float32(self("MatMul", self("Cast", a, to=half), self("Cast", b, to=half)))

    def linear(self, name: str, h: str) -> str:
        kernel, dtype = self.stored(name), self.tensors[name].dtype
        if dtype == "I8":
            kernel = self("DequantizeLinear", kernel, self.stored(f"{name}{SCALE}"), axis=1)
        elif dtype == "BF16":
            kernel = self.float32(kernel)
        y, bias = self.matmul(h, kernel), self.stored(f"{name}_bias")
        return self("Add", y, bias) if bias else y

    def rows_of(self, name: str, index: str) -> str:
        """float32 rows of a table."""
        rows = self.float32(self("Gather", self.stored(name), index))
        if scale := self.stored(f"{name}{SCALE}"):
            rows = self("Mul", rows, self.unsqueeze(self("Gather", scale, index), 2))
        return rows

    def reshape(self, x: str, *shape: int) -> str:
        """Reshapes x; 0 keeps the size of an axis."""
        return self("Reshape", x, np.array(shape, np.int64))

    def unsqueeze(self, x: str, *axes: int) -> str:
        return self("Unsqueeze", x, np.array(axes, np.int64))

    def part(self, x: str, axis: int, start: int, end: int) -> str:
        return self("Slice", x, *(np.array([n], np.int64) for n in (start, end, axis)))

    def count(self, x: str, axis: int) -> str:
        """int64 [n]: 0, 1, … along an axis of x."""
        size = self("Gather", self("Shape", x), np.int64(axis))
        return self("Range", np.int64(0), size, np.int64(1))

    def int64(self, x: str) -> str:
        return self("Cast", x, to=TensorProto.INT64)


def build(weights: pathlib.Path, network: dict, signature: Signature) -> onnx.ModelProto:
    """score, or step if the signature has a cache.

    Args:
      weights: the safetensors file under plain names; save the model in its folder.
      network: the dict of plain.description.
    """
    g = Graph(weights)
    cached = "filled" in {array.name for array in signature.inputs}
    slots, mask = _slots_and_mask(g, cached)
    h, all_keys, all_values = g.rows_of("embedding", "token"), [], []
    angles = None
    if "positions" in g.tensors:
        h = g("Add", h, g.rows_of("positions", "position"))
    else:
        angle = g("Cast", g.unsqueeze("position", 2, 3, 4), to=TensorProto.FLOAT)
        angle = g("Mul", angle, g.stored("rope"))
        angles = g("Cos", angle), g("Sin", angle)
    for i in range(network["blocks"]):
        h, keys, values = _block(g, i, network, h, angles, slots, mask)
        all_keys.append(g.unsqueeze(keys, 0))
        all_values.append(g.unsqueeze(values, 0))
    results = [g.linear("logits", _normed(g, network, h))]
    if cached:
        results += [g("Concat", *all_keys, axis=0), g("Concat", *all_values, axis=0)]
    names = [array.name if not cached or array.name == "logits" else f"{array.name}_out"
             for array in signature.outputs]  # fmt: skip
    for result, name in zip(results, names, strict=True):
        g.nodes.append(helper.make_node("Identity", [result], [name]))
    assert not g.unused, f"weights without a node: {g.unused}"
    graph = helper.make_graph(
        g.nodes,
        "step" if cached else "score",
        [_info(array, array.name) for array in signature.inputs],
        [_info(array, name) for array, name in zip(signature.outputs, names, strict=True)],
        list(g.initializers.values()),
    )
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)


def _info(array: Array, name: str):
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(array.dtype))
    return helper.make_tensor_value_info(name, dtype, array.shape)


def _slots_and_mask(g: Graph, cached: bool):
    """(cache slots of the tokens, int64 [b, w, 2]; the mask, bool [b, 1, 1, w, s])."""
    rank, in_context = g.int64("rank"), "in_context"
    k_rank, k_in_context, slots = rank, in_context, None
    if cached:
        filled = g.unsqueeze(g.int64("filled"), 1)
        slots = g("Add", filled, g.unsqueeze(g.count("token", 1), 0))
        rows = g("Expand", g.unsqueeze(g.count("token", 0), 1), g("Shape", slots))
        slots = g("Concat", g.unsqueeze(rows, 2), g.unsqueeze(slots, 2), axis=2)
        before = g("Less", g.unsqueeze(g.count("keys", 2), 0), filled)
        k_rank = g("Where", before, np.int64(-1), np.int64(EMPTY_RANK))
        ones = g("Where", before, np.int64(1), np.int64(1))
        k_rank = g("ScatterND", k_rank, slots, rank)
        k_in_context = g("ScatterND", ones, slots, g.int64(in_context))
        k_in_context = g("Equal", k_in_context, np.int64(1))
    q_rank, q_in_context = g.unsqueeze(rank, 2), g.unsqueeze(in_context, 2)
    k_rank, k_in_context = g.unsqueeze(k_rank, 1), g.unsqueeze(k_in_context, 1)
    is_copy = g("Not", q_in_context)
    reads_context = g("LessOrEqual", k_rank, g("Sub", q_rank, g.int64(is_copy)))
    reads_copy = g("And", is_copy, g("Equal", k_rank, q_rank))
    mask = g(
        "Or",
        g("And", k_in_context, reads_context),
        g("And", g("Not", k_in_context), reads_copy),
    )
    return slots, g.unsqueeze(mask, 1, 2)


def _normed(g: Graph, network: dict, h: str) -> str:
    if network["norm"] == "layer":
        h = g("Sub", h, g("ReduceMean", h, np.array([-1], np.int64)))
    return _rms_normed(g, network, h)


def _rms_normed(g: Graph, network: dict, x: str) -> str:
    square = g("ReduceMean", g("Mul", x, x), np.array([-1], np.int64))
    return g("Div", x, g("Sqrt", g("Add", square, np.float32(network["epsilon"]))))


def _rotate(g: Graph, x: str, half: int, cos: str, sin: str) -> str:
    """RoPE (half-split) of x [b, t, …, K]."""
    a, b = g.part(x, -1, 0, half), g.part(x, -1, half, 2 * half)
    first = g("Sub", g("Mul", a, cos), g("Mul", b, sin))
    return g("Concat", first, g("Add", g("Mul", b, cos), g("Mul", a, sin)), axis=-1)


def _block(g: Graph, i: int, network, h: str, angles, slots, mask):
    """h after block i, and keys and values [b, s, G, K]."""
    name = {part: f"blocks.{i}.{part}" for part in PARTS}
    _, groups, of_group, width = g.tensors[name["qkv"]].shape
    per_group = of_group - 2
    qkv = g.linear(name["qkv"], _normed(g, network, h))
    qkv = g.reshape(qkv, 0, 0, groups, of_group, width)
    qk, v = g.part(qkv, 3, 0, per_group + 1), g.part(qkv, 3, per_group + 1, of_group)
    if scale := g.stored(name["qk_norm_scale"]):
        qk = g("Mul", _rms_normed(g, network, qk), scale)
    qk = _rotate(g, qk, width // 2, *angles) if angles else qk
    q, k = g.part(qk, 3, 0, per_group), g.part(qk, 3, per_group, per_group + 1)
    k, v = (g("Squeeze", x, np.array([3], np.int64)) for x in (k, v))
    if g.is_half:
        k, v = (g("Cast", x, to=TensorProto.FLOAT16) for x in (k, v))
    if slots is not None:
        k = g("ScatterND", g("Gather", "keys", np.int64(i)), slots, k)
        v = g("ScatterND", g("Gather", "values", np.int64(i)), slots, v)
    flat = g.reshape(_attend(g, q, k, v, mask), 0, 0, groups * per_group * width)
    h = g("Add", h, g.linear(name["attention_out"], flat))
    inner = g.linear(name["mlp_in"], _normed(g, network, h))
    h = g("Add", h, g.linear(name["mlp_out"], _activate(g, network, inner, name["mlp_in"])))
    return h, k, v


def _attend(g: Graph, q: str, k: str, v: str, mask: str) -> str:
    """q [b, t, G, R, K]; k, v [b, s, G, K] → [b, t, G, R, K]."""
    q = g("Transpose", q, perm=[0, 2, 3, 1, 4])
    k = g.unsqueeze(g("Transpose", k, perm=[0, 2, 3, 1]), 2)
    v = g.unsqueeze(g("Transpose", v, perm=[0, 2, 1, 3]), 2)
    scores = g("Where", mask, g.matmul(q, k), np.float32(MASKED))
    out = g.matmul(g("Softmax", scores, axis=-1), v)
    return g("Transpose", out, perm=[0, 3, 1, 2, 4])


def _activate(g: Graph, network, x: str, kernel: str) -> str:
    if network["activation"] == "swiglu":
        *_, inner = g.tensors[kernel].shape
        a, b = g.part(x, -1, 0, inner), g.part(x, -1, inner, 2 * inner)
        return g("Mul", g("Mul", a, g("Sigmoid", a)), b)
    return g("Gelu", x, approximate="tanh")


def save(model: onnx.ModelProto, path: pathlib.Path) -> None:
    """Saves the model in the folder of its weights and runs the ONNX checker on it."""
    onnx.save(model, path)
    onnx.checker.check_model(path, full_check=True)
