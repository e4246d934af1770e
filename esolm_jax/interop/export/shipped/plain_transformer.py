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

EMPTY_RANK = np.iinfo(np.int32).max  # of an empty slot of the cache: no token reads it
MASKED = -1e30  # far below any score


def load(folder):
    """(weights by name, the config) of an export."""
    folder = pathlib.Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return read_safetensors(folder / "weights.safetensors"), config


def read_safetensors(path):
    """Read-only float32 arrays by name, in the memory of the file."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "r", offset=8 + size)
    arrays = {}
    for name, about in header.items():
        start, end = about["data_offsets"]
        arrays[name] = np.asarray(data[start:end]).view(np.float32).reshape(about["shape"])
    return arrays


def score(weights, network, token, position, rank, in_context, *, xp=np):
    """Logits float32 [B, T, V] of tokens that see only each other; the mask token's column is not
    excluded."""
    return forward(weights, network, token, position, rank, in_context, xp=xp)[0]


def step(weights, network, token, position, rank, in_context, keys, values, filled, *, xp=np):
    """Logits of W tokens that also see a cache, and the cache with theirs in it.

    Args:
      token, position, rank, in_context: [B, W].
      keys, values: float32 [blocks, B, S, G, K].
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
    h, angles, all_keys, all_values = weights["embedding"][token], None, [], []
    if "positions" in weights:
        h = h + weights["positions"][position]
    else:
        rope = weights["rope"][None, None, None, None]
        angle = position[:, :, None, None, None].astype(np.float32) * rope
        angles = xp.cos(angle), xp.sin(angle)
    for i in range(network["blocks"]):
        block = {part: weights.get(f"blocks.{i}.{part}") for part in PARTS}
        qkv = linear(block, "qkv", normed(network, h, xp))
        qk, v = qkv[:, :, :, :-1], qkv[:, :, :, -1]
        if block["qk_norm_scale"] is not None:
            qk = rms_normed(network, qk, xp) * block["qk_norm_scale"][None, None, None]
        qk = qk if angles is None else rotate(qk, *angles, xp)
        q, k = qk[:, :, :, :-1], qk[:, :, :, -1]
        if past is not None:
            k, v = put(past[0][i], slots, k), put(past[1][i], slots, v)
        all_keys.append(k)
        all_values.append(v)
        attended = attend(q, k, v, mask, xp).reshape(*h.shape[:2], -1)
        h = h + linear(block, "attention_out", attended)
        inner = linear(block, "mlp_in", normed(network, h, xp))
        h = h + linear(block, "mlp_out", activate(network, inner, xp))
    if pick is not None:
        h = xp.take_along_axis(h, pick[:, :, None], axis=1)
    return linear(weights, "logits", normed(network, h, xp)), all_keys, all_values


PARTS = ("qkv", "qkv_bias", "qk_norm_scale", "attention_out", "attention_out_bias")
PARTS += ("mlp_in", "mlp_in_bias", "mlp_out", "mlp_out_bias")


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


def linear(weights, name, h):
    kernel, bias = weights[name], weights.get(f"{name}_bias")
    y = h @ kernel.reshape(kernel.shape[0], -1)
    y = y if bias is None else y + bias.reshape(1, 1, -1)
    return y.reshape(*h.shape[:2], *kernel.shape[1:])


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
    scores = xp.where(mask[:, None, None], q @ xp.swapaxes(k, 3, 4), np.float32(MASKED))
    probs = xp.exp(scores - scores.max(axis=-1, keepdims=True))
    probs = probs / probs.sum(axis=-1, keepdims=True)
    return xp.moveaxis(probs @ v[:, :, None], 3, 1)


def activate(network, x, xp):
    """GELU (by tanh), or SwiGLU of two parts: [B, T, gates, F] → [B, T, F]."""
    a, half = x[:, :, 0], np.float32(0.5)
    if network["activation"] == "swiglu":
        return half * a * (1 + xp.tanh(half * a)) * x[:, :, 1]
    inner = np.float32((2 / np.pi) ** 0.5) * (a + np.float32(0.044715) * a * a * a)
    return half * a * (1 + xp.tanh(inner))
