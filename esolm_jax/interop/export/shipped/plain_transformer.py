"""The exported network in numpy: a plain transformer over labelled tokens. Needs only numpy.

    weights, config = load(FOLDER)
    logits = score(weights, config["network"], token, position, rank, in_context)

Each token has four labels, arrays [B, T]: `token`, its id (the mask id where it is to be
predicted); `position` in the text, below the length of `positions` if these are learned; `rank` in
the order of generation; `in_context`, False for a query copy, which no later token reads.
`visible` defines the keys that a query reads.
"""

import json
import pathlib

import numpy as np

NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8}
SCALE = "_scale"  # NAME_scale holds the scales of the int8 codes NAME
BY_ROW = ("embedding", "positions")  # one scale per row; other codes: one per output channel
EMPTY_RANK = np.iinfo(np.int32).max  # of an empty slot of the cache: no token reads it
MASKED = -1e30  # far below any score


def load(folder):
    """(weights by name, the config) of an export."""
    folder = pathlib.Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return read_safetensors(folder / "weights.safetensors"), config


def read_safetensors(path):
    """float32 arrays by name. Those of a float32 file are read-only, in the memory of the file;
    others are converted."""
    arrays = {}
    for name, (dtype, array) in stored_arrays(path).items():
        if dtype == "BF16":
            array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
        arrays[name] = array if dtype == "I8" else array.astype(np.float32, copy=False)
    for name in [name for name in arrays if f"{name}{SCALE}" in arrays]:
        scale = arrays.pop(f"{name}{SCALE}")
        by_row = name in BY_ROW
        arrays[name] = arrays[name] * (scale[:, None] if by_row else scale[None])
    return arrays


def stored_arrays(path):
    """(dtype of the file, read-only array) by name; BF16 as uint16."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "r", offset=8 + size)
    arrays = {}
    for name, about in header.items():
        (start, end), dtype = about["data_offsets"], NUMPY[about["dtype"]]
        array = np.asarray(data[start:end]).view(dtype).reshape(about["shape"])
        arrays[name] = about["dtype"], array
    return arrays


def score(weights, network, token, position, rank, in_context, *, xp=np):
    """Logits float32 [B, T, V] of tokens that see only each other; the mask token's column is not
    excluded."""
    return forward(weights, network, token, position, rank, in_context, xp=xp)[0]


def step(weights, network, token, position, rank, in_context, keys, values, filled, *, xp=np):
    """Logits of W tokens that also see a cache, and the cache with theirs in it.

    Args:
      token, position, rank, in_context: [B, W].
      keys, values: [blocks, B, S, G, K], float32 or of the type of 16-bit weights.
      filled: int32 [B]. Slots below it hold tokens of lower ranks, which all W tokens see. The W
        tokens are written to the slots [filled, filled + W), so S must be at least filled + W. To
        keep only the first n of them, add n to `filled` for the next step.

    Returns: logits [B, W, V], keys, values.
    """
    past = keys, values, filled
    logits, keys, values = forward(
        weights, network, token, position, rank, in_context, past=past, xp=xp
    )
    return logits, xp.stack(keys), xp.stack(values)


def forward(weights, network, token, position, rank, in_context, *, past=None, pick=None, xp=np):
    """Returns (logits, keys, values), the latter [B, S, G, K] of each block.

    Args:
      network: {"blocks": N, "norm": "layer" | "rms", "epsilon": …, "activation": "gelu" | "swiglu"}
      past: (keys, values, filled), keys and values by block; None = there is no cache.
      pick: int32 [B, P], tokens to return logits of; None = all.
      xp: numpy or jax.numpy.
    """
    batch, width = token.shape
    k_rank, k_in_context, slots = rank, in_context, None
    if past is not None:
        rows = xp.arange(batch, dtype=np.int32)[:, None]
        slots = rows, past[2][:, None] + xp.arange(width, dtype=np.int32)[None]
        slot = xp.arange(past[0][0].shape[1], dtype=np.int32)[None]
        k_rank = xp.where(slot < past[2][:, None], np.int32(-1), np.int32(EMPTY_RANK))
        k_rank = put(k_rank, slots, rank)
        k_in_context = put(xp.ones(k_rank.shape, bool), slots, in_context)
    mask = visible(rank[:, :, None], in_context[:, :, None], k_rank[:, None], k_in_context[:, None])
    h, angles, all_keys, all_values = rows_of(weights, "embedding", token), None, [], []
    if "positions" in weights:
        h = h + rows_of(weights, "positions", position)
    else:
        rope = weights["rope"][None, None, None, None]
        angle = position[:, :, None, None, None].astype(np.float32) * rope
        angles = xp.cos(angle), xp.sin(angle)
    for i in range(network["blocks"]):
        block = {part: weights.get(f"blocks.{i}.{part}") for part in PARTS}
        qkv = linear(block, "qkv", normed(network, h, xp), xp)
        qk, v = qkv[:, :, :, :-1], qkv[:, :, :, -1]
        if block["qk_norm_scale"] is not None:
            qk = rms_normed(network, qk, xp) * block["qk_norm_scale"][None, None, None]
        qk = qk if angles is None else rotate(qk, *angles, xp)
        q, k, v = (x.astype(cache_dtype(block)) for x in (qk[:, :, :, :-1], qk[:, :, :, -1], v))
        if past is not None:
            k, v = put(past[0][i], slots, k), put(past[1][i], slots, v)
        all_keys.append(k)
        all_values.append(v)
        attended = attend(q, k, v, mask, xp).reshape(*h.shape[:2], -1)
        h = h + linear(block, "attention_out", attended, xp)
        inner = linear(block, "mlp_in", normed(network, h, xp), xp)
        h = h + linear(block, "mlp_out", activate(network, inner, xp), xp)
    if pick is not None:
        h = xp.take_along_axis(h, pick[:, :, None], axis=1)
    return linear(weights, "logits", normed(network, h, xp), xp), all_keys, all_values


PARTS = ("qkv", "qkv_bias", "qk_norm_scale", "attention_out", "attention_out_bias")
PARTS += ("mlp_in", "mlp_in_bias", "mlp_out", "mlp_out_bias")
PARTS += tuple(f"{kernel}{SCALE}" for kernel in ("qkv", "attention_out", "mlp_in", "mlp_out"))


def visible(q_rank, q_in_context, k_rank, k_in_context):
    """Whether a query reads a key. Each token reads itself. A query copy is read by copies of its
    rank only, and does not read the context of its rank."""
    reads_context = k_rank <= q_rank - (~q_in_context).astype(np.int32)
    reads_copy = ~q_in_context & (k_rank == q_rank)
    return (k_in_context & reads_context) | (~k_in_context & reads_copy)


def put(cache, slots, new):
    """The cache with `new` at (row, slot)."""
    if hasattr(cache, "at"):  # jax
        return cache.at[slots].set(new, mode="drop")
    cache = cache.copy()
    cache[slots] = new
    return cache


def rows_of(weights, name, index):
    """float32 [B, T, D]: rows of a table."""
    rows, scale = weights[name][index].astype(np.float32), weights.get(f"{name}{SCALE}")
    return rows if scale is None else rows * scale[index][..., None]


def linear(weights, name, h, xp):
    """float32 [B, T, …]."""
    kernel, bias, scale = (weights.get(f"{name}{part}") for part in ("", "_bias", SCALE))
    y = matmul(h, kernel.reshape(kernel.shape[0], -1), xp)
    y = y if scale is None else y * scale.reshape(1, 1, -1)
    y = y if bias is None else y + bias.reshape(1, 1, -1)
    return y.reshape(*h.shape[:2], *kernel.shape[1:])


def matmul(a, b, xp):
    """float32 a @ b. If b has 16 bits, a is rounded to its type and sums are float32; int8 codes
    are multiplied as float32."""
    if b.dtype == np.float32:
        return a @ b
    if b.dtype == np.int8:
        return a @ b.astype(np.float32)
    return xp.matmul(a.astype(b.dtype), b, preferred_element_type=np.float32)


def cache_dtype(block):
    """The type of keys and values: that of 16-bit weights, else float32."""
    dtype = block["qkv"].dtype
    return np.float32 if dtype == np.int8 else dtype


def normed(network, h, xp):
    """LayerNorm or RMSNorm; its scale is folded into the next weights."""
    if network["norm"] == "layer":
        h = h - h.mean(axis=-1, keepdims=True)
    return rms_normed(network, h, xp)


def rms_normed(network, x, xp):
    return x / xp.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(network["epsilon"]))


def rotate(x, cos, sin, xp):
    """RoPE: the pairs are (i, i + K/2)."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return xp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(q, k, v, mask, xp):
    """q [B, T, G, R, K], k and v [B, S, G, K], mask [B, T, S] → [B, T, G, R, K]; the scale of the
    scores is in the weights."""
    q, k, v = xp.moveaxis(q, 1, 3), xp.moveaxis(k, 1, 2)[:, :, None], xp.moveaxis(v, 1, 2)
    scores = matmul(q, xp.swapaxes(k, 3, 4), xp)
    scores = xp.where(mask[:, None, None], scores, np.float32(MASKED))
    probs = xp.exp(scores - scores.max(axis=-1, keepdims=True))
    probs = probs / probs.sum(axis=-1, keepdims=True)
    return xp.moveaxis(matmul(probs, v[:, :, None], xp), 3, 1)


def activate(network, x, xp):
    """GELU (by tanh), or SwiGLU of two parts: [B, T, gates, F] → [B, T, F]."""
    a, half = x[:, :, 0], np.float32(0.5)
    if network["activation"] == "swiglu":
        return half * a * (1 + xp.tanh(half * a)) * x[:, :, 1]
    inner = np.float32((2 / np.pi) ** 0.5) * (a + np.float32(0.044715) * a * a * a)
    return half * a * (1 + xp.tanh(inner))
