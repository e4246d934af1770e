"""The network that generates: the trained one with adaLN folded into its weights, for few tokens.

In a pass over a window of W tokens everything in the cache is visible to the whole window, for it
is of lower ranks; inside the window the rule of attention decides. So the cache needs no labels,
only, for each row, how many of its slots are filled. Blocks are not stacked: to cut one block's
weights out of a stack costs as much as to use them.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from esolm_jax import model as model_lib
from esolm_jax import sharding
from esolm_jax.attention import MASKED
from esolm_jax.model import ModelConfig


@flax.struct.dataclass
class Network:
    """Weights in the compute dtype, biases float32; biases are None where there are none.

    Attributes:
      embedding: [V, D].
      blocks: for each block a dict of `qkv` [D, G, R + 2, K] (the queries of a group, scaled by
        1/√K, then its key and value), `attention_out` [H·K, D], `mlp_in` [D, gates, F],
        `mlp_out` [F, D], and their biases `…_bias`.
      logits, logits_bias: [D, V], [V].
      config: of the trained model.
    """

    embedding: jax.Array
    blocks: tuple[dict, ...]
    logits: jax.Array
    logits_bias: jax.Array | None
    config: ModelConfig = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Cache:
    """Keys [B, G, K, S] (as their product with queries wants them) and values [B, G, S, K] of each
    block."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @property
    def slots(self) -> int:
        return self.values[0].shape[2]


def empty_cache(config: ModelConfig, batch: int, slots: int, mesh: Mesh | None = None) -> Cache:
    """A cache of S = `slots` for B = `batch` rows, which lie on the mesh as their tokens do."""
    shape = batch, config.groups, slots, config.head_width

    def zeros(shape, *axes):
        where = None if mesh is None else sharding.place(mesh, *axes)
        return jnp.zeros(shape, config.dtype, device=where)

    rows = ("rows", "heads", None, None)
    return Cache(
        keys=tuple(zeros((*shape[:2], shape[3], shape[2]), *rows) for _ in range(config.blocks)),
        values=tuple(zeros(shape, *rows) for _ in range(config.blocks)),
    )


_PLACES = {  # logical axes; rows are split, so no weights are over fsdp
    "embedding": (None, None),
    "qkv": (None, "heads", None, None),
    "qkv_bias": ("heads", None, None),
    "attention_out": ("heads", None),
    "mlp_in": (None, None, "mlp"),
    "mlp_in_bias": (None, "mlp"),
    "mlp_out": ("mlp", None),
    "mlp_out_bias": (None,),
    "logits": (None, "vocab"),
    "logits_bias": ("vocab",),
}


def shardings(network: Network, mesh: Mesh) -> Network:
    """Where each of its arrays lies: heads, the MLP and the vocabulary are split over `tensor`."""

    def place(path, array):
        key = path[-1]
        name = key.name if isinstance(key, jax.tree_util.GetAttrKey) else key.key
        return sharding.place(mesh, *_PLACES[name])

    return jax.tree.map_with_path(place, network)


def fold(config: ModelConfig, params: dict, mesh: Mesh | None = None) -> Network:
    """Folds the norms' scales, adaLN at σ = 0 and the scale of the scores into the weights.

    Args:
      params: as of model.init, on the mesh as sharding.parameters says.
      mesh: None = one device; else see shardings().
    """
    make = functools.partial(_fold, config)
    if mesh is None:
        return jax.jit(make)(params)
    where = shardings(jax.eval_shape(make, params), mesh)
    return jax.jit(make, out_shardings=where)(params)


def _fold(config: ModelConfig, params: dict) -> Network:
    of_blocks, of_head = model_lib.modulations(config, params)
    stacked = params["blocks"]

    def put(name, array):
        return array.astype(jnp.float32 if "bias" in name else config.dtype)

    blocks = []
    for i in range(config.blocks):
        weights = jax.tree.map(lambda leaf: leaf[i], stacked)  # noqa: B023
        found = _fold_block(config, weights, [part[i] for part in of_blocks])
        blocks.append({name: put(name, array) for name, array in found.items()})
    shift, scale = of_head
    kernel, bias = _behind_norm(params["final_norm"], params["logits"], shift, scale, config)
    return Network(
        embedding=params["embedding"]["embedding"].astype(config.dtype),
        blocks=tuple(blocks),
        logits=kernel.astype(config.dtype),
        logits_bias=bias,
        config=config,
    )


def _behind_norm(norm: dict, linear: dict, shift, scale, config):
    """(kernel, bias) that act on the normed h as `linear` does on h · norm · (1 + scale) + shift."""
    kernel, bias = linear["kernel"], linear.get("bias")
    if config.cond_width:
        moved = jnp.tensordot(shift, kernel, 1)
        bias = moved if bias is None else bias + moved
    rows = norm["scale"] * (1 + scale) * jnp.ones(len(kernel))
    return rows.reshape(-1, *[1] * (kernel.ndim - 1)) * kernel, bias


def _fold_block(config, weights: dict, modulation) -> dict:
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
    qkv, qkv_bias = _behind_norm(weights["attention_norm"], weights["qkv"], shift, scale, config)
    queries = qkv.shape[2] - 2
    score = jnp.where(jnp.arange(qkv.shape[2]) < queries, config.head_width**-0.5, 1.0)[:, None]
    mlp_in, mlp_bias = _behind_norm(
        weights["mlp_norm"], weights["mlp_in"], mlp_shift, mlp_scale, config
    )
    found = {
        "qkv": qkv * score[None, None],
        "qkv_bias": None if qkv_bias is None else qkv_bias * score[None],
        "attention_out": weights["attention_out"]["kernel"] * _row(gate),
        "mlp_in": mlp_in,
        "mlp_in_bias": mlp_bias,
        "mlp_out": weights["mlp_out"]["kernel"] * _row(mlp_gate),
        "mlp_out_bias": weights["mlp_out"].get("bias"),
    }
    if found["mlp_out_bias"] is not None:
        found["mlp_out_bias"] = found["mlp_out_bias"] * mlp_gate
    return {name: array for name, array in found.items() if array is not None}


def _row(gate):
    return gate if jnp.ndim(gate) == 0 else gate[None]


@dataclasses.dataclass(frozen=True)
class Window:
    """What a pass runs: W tokens of each row.

    Attributes:
      token, position: int32 [B, W].
      visible: bool [B, W, W], by the rule, [row, query, key]; a token sees at least itself.
      filled: int32 [B]: slots of the cache below are visible, to all.
      pick: int32 [B, P], the places in the window that logits are wanted of.
    """

    token: jax.Array
    position: jax.Array
    visible: jax.Array
    filled: jax.Array
    pick: jax.Array


def forward(network: Network, window: Window, cache: Cache | None, spans: tuple[int, ...]):
    """One pass. The cache is read, not written.

    Args:
      cache: None = nothing was generated that would have to be seen.
      spans: ascending numbers of slots, the last one enough for any pass: attention reads the
        fewest of them that hold what is filled.

    Returns:
      (logits float32 [B, P, V], mask token not excluded, or None if P = 0;
       keys [B, G, K, W] and values [B, G, W, K] of each block, to be written to the cache.)
    """
    config = network.config
    h = network.embedding[window.token]
    cos, sin = model_lib.rope_angles(window.position, config.head_width, config.rope_base)
    span = None
    if cache is not None:
        span = jnp.searchsorted(jnp.array(spans), window.filled.max())
    keys, values = [], []
    for i, block in enumerate(network.blocks):
        q, k, v = _heads(config, block, _norm(config, h), cos, sin)
        past = None if cache is None else (cache.keys[i], cache.values[i])
        a_BGRWK = _attend(q, k, v, past, window, spans, span)
        flat = jnp.moveaxis(a_BGRWK, 3, 1).reshape(*h.shape[:2], -1).astype(h.dtype)
        h = h + flat @ block["attention_out"]
        h = h + _mlp(config, block, _norm(config, h))
        keys.append(k.swapaxes(2, 3))
        values.append(v)
    if window.pick.shape[1] == 0:
        return None, keys, values
    h = jnp.take_along_axis(h, window.pick[..., None], axis=1)
    logits = jnp.matmul(_norm(config, h), network.logits, preferred_element_type=jnp.float32)
    if network.logits_bias is not None:
        logits = logits + network.logits_bias[None, None]
    return logits, keys, values


def _norm(config, h_BWD):
    """LayerNorm or RMSNorm without its scale, which is in the weights; float32 inside."""
    h = h_BWD.astype(jnp.float32)
    if config.style != "llama":
        h = h - h.mean(axis=-1, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-5)
    return h.astype(config.dtype)


def _linear(block, name, h_BWD):
    y = jnp.tensordot(h_BWD, block[name], 1)
    bias = block.get(f"{name}_bias")
    return y if bias is None else y + bias.astype(y.dtype).reshape(1, 1, *bias.shape)


def _heads(config, block, normed, cos, sin):
    """Rotated queries [B, G, R, W, K] and keys [B, G, W, K], and values."""
    qkv_BGRWK = jnp.moveaxis(_linear(block, "qkv", normed), 1, 3)
    rotated = model_lib.rotate(qkv_BGRWK[:, :, :-1], cos[:, None], sin[:, None])
    return rotated[:, :, :-1], rotated[:, :, -1], qkv_BGRWK[:, :, -1]


def _mlp(config, block, normed):
    inner = _linear(block, "mlp_in", normed)
    return _linear(block, "mlp_out", model_lib.activate(config, inner))


def _attend(q_BGRWK, k, v, past, window, spans, span):
    """Attention of the window to the cache and to itself."""
    if past is None:
        return _attend_span(0, q_BGRWK, k, v, None, window)
    branches = [functools.partial(_attend_span, n) for n in spans]
    if len(branches) == 1:
        return branches[0](q_BGRWK, k, v, past, window)

    def attend_span(n):
        return lambda past: _attend_span(n, q_BGRWK, k, v, past, window)

    return jax.lax.switch(span, [attend_span(n) for n in spans], past)


def _attend_span(span: int, q_BGRWK, k, v, past, window):
    """Softmax in float32 over `span` slots of the cache and the window."""
    batch, groups, per_group, width, head_width = q_BGRWK.shape
    q = q_BGRWK.reshape(batch, groups, per_group * width, head_width)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    here = dot("bgtk,bgsk->bgts", q, k).reshape(batch, groups, per_group, width, width)
    here = jnp.where(window.visible[:, None, None], here, MASKED)
    here = here.reshape(batch, groups, -1, width)
    if not span:
        probs = jax.nn.softmax(here, axis=-1).astype(v.dtype)
        return dot("bgts,bgsk->bgtk", probs, v).reshape(q_BGRWK.shape)
    keys, values = past[0][..., :span], past[1][:, :, :span]
    there = dot("bgtk,bgks->bgts", q, keys)
    filled = jnp.arange(span)[None] < window.filled[:, None]
    there = jnp.where(filled[:, None, None], there, MASKED)
    top = jnp.maximum(here.max(-1, keepdims=True), there.max(-1, keepdims=True))
    here, there = jnp.exp(here - top), jnp.exp(there - top)
    total = here.sum(-1, keepdims=True) + there.sum(-1, keepdims=True)
    out = dot("bgts,bgsk->bgtk", there.astype(v.dtype), values)
    out = (out + dot("bgts,bgsk->bgtk", here.astype(v.dtype), v)) / total
    return out.reshape(q_BGRWK.shape)


def write(cache: Cache, keys, values, start, *, aligned: bool) -> Cache:
    """Puts what a pass returned into slots [start, start + W).

    Args:
      start: int32 [B]; start + W must not exceed the slots.
      aligned: all rows start at the same slot, which is faster.
    """
    if aligned:

        def put(array, new, axis):
            return jax.lax.dynamic_update_slice_in_dim(array, new, start[0], axis)
    else:

        def put(array, new, axis):
            put_row = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1)
            return jax.vmap(put_row)(array, new, start)

    return Cache(
        keys=tuple(put(a, new, 3) for a, new in zip(cache.keys, keys, strict=True)),
        values=tuple(put(a, new, 2) for a, new in zip(cache.values, values, strict=True)),
    )
