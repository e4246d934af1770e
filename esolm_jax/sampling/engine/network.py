"""The network of decoding: the trained one with adaLN folded into its weights, for few tokens.

In a pass over W tokens the whole window reads everything in the cache, because its ranks are lower;
the attention rule applies inside the window. So the cache has no labels, only the number of filled
slots of each row. Blocks are not stacked: slicing the weights of one block out of a stack
costs as much as using them.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from esolm_jax.attention.recompute import pad_to_multiple
from esolm_jax.model import rope
from esolm_jax.model import transformer as model_lib
from esolm_jax.model.lm_head import LANES
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.parallel import multihost, sharding, stored_programs
from esolm_jax.sampling.engine.cache import Entries, Heads, KVCache, Visible
from esolm_jax.sampling.engine.quantize import Quantized, quantize
from esolm_jax.sampling.engine.residual import Layer, Residual


@flax.struct.dataclass
class Network:
    """Weights in the compute dtype, biases and scales float32; None where there are none.

    Attributes:
      embedding: [V, D].
      positions: [positions, D], the embedding of learned positions.
      blocks: for each block a dict of `qkv` [D, G, R + 2, K] (the queries of a group, scaled by
        1/√K, then its key and value), `attention_out` [H·K, D], `mlp_in` [D, gates, F],
        `mlp_out` [F, D], their biases `…_bias`, and, if queries and keys are normed,
        `qk_norm_scale` [R + 1, K]: of the queries, by 1/√K too, and the key.
      logits, logits_bias: [D, V], [V]. On a GPU V is rounded up: loads of several weights at once
        need rows of a multiple of 16 bytes.
        Matrices may be quantized.
      config: sizes of the trained model.
    """

    embedding: jax.Array
    positions: jax.Array | None
    blocks: tuple[dict, ...]
    logits: jax.Array | Quantized
    logits_bias: jax.Array | None
    config: ModelConfig = flax.struct.field(pytree_node=False)


_LOGICAL_AXES = {  # logical axes; rows are split, so no weights are over fsdp
    "embedding": (None, None),
    "positions": (None, None),
    "qkv": (None, "heads", None, None),
    "qkv_bias": ("heads", None, None),
    "qk_norm_scale": (None, None),
    "attention_out": ("heads", None),
    "attention_out_bias": (None,),
    "mlp_in": (None, None, "mlp"),
    "mlp_in_bias": (None, "mlp"),
    "mlp_out": ("mlp", None),
    "mlp_out_bias": (None,),
    "logits": (None, "vocab"),
    "logits_bias": ("vocab",),
}


def shardings(network: Network, mesh: Mesh) -> Network:
    """The sharding of each array: heads, the MLP and the vocabulary are split over `tensor`."""

    def place(path, array):
        names = [getattr(key, "name", getattr(key, "key", None)) for key in path]
        is_scale, is_codes = (names[-1] == part for part in ("scale", "codes"))
        axes = _LOGICAL_AXES[names[-2] if is_scale or is_codes else names[-1]]
        return sharding.named_sharding(mesh, *(axes[1:] if is_scale else axes))

    return jax.tree.map_with_path(place, network)


def fold(
    config: ModelConfig,
    params: dict,
    mesh: Mesh | None = None,
    *,
    runs_on: Mesh | None = None,
    dtype: str = "auto",
) -> Network:
    """Folds the norms' scales and biases, adaLN at σ = 0 and the scale of the scores into the
    weights.

    Args:
      params: as of model.init, on the mesh as sharding.parameters says.
      mesh: None = one device; else see shardings().
      runs_on: the mesh to which the network is moved then; None = `mesh`.
      dtype: of the matrices but the embedding: of config.sample.weight_dtype.

    Raises:
      AssertionError: the model has parameters that this network does not know; it names them.
    """
    make = functools.partial(_fold, config, dtype, columns_multiple(runs_on or mesh))
    if mesh is None:
        return jax.jit(make)(params)
    where = shardings(jax.eval_shape(make, params), mesh)
    return multihost.together(jax.jit(make, out_shardings=where))(params)


def compiled_fold(
    config: ModelConfig, params: dict, mesh: Mesh, *, runs_on: Mesh, dtype: str = "auto"
) -> jax.stages.Compiled:
    """`fold` as a function of parameters like `params` (ShapeDtypeStructs, on the mesh), compiled
    or from the user's folder."""
    multiple = columns_multiple(runs_on)

    def lower(params: dict) -> jax.stages.Lowered:
        make = functools.partial(_fold, config, dtype, multiple)
        where = shardings(jax.eval_shape(make, params), mesh)
        return jax.jit(make, out_shardings=where).lower(params)

    return stored_programs.compile_or_load(f"fold {config} {dtype} {multiple}", lower, (params,))


def columns_multiple(mesh: Mesh | None) -> int:
    """The number of logits of a network on this mesh is a multiple: on GPUs, of LANES a shard."""
    if mesh is None or sharding.platform(mesh) != "gpu":
        return 1
    return LANES * mesh.shape["tensor"]


def _fold(config: ModelConfig, dtype: str, multiple: int, params: dict) -> Network:
    of_blocks, of_head = model_lib.modulations(config, params)
    left = jax.tree.map(lambda leaf: leaf, params)  # a copy; folded parameters are removed from it
    stacked = left.pop("blocks")
    for name in ("time", "final_modulation"):  # they are in of_blocks and of_head
        left.pop(name, None)

    def put(name, array):
        if name.endswith(("bias", "scale")):
            return array.astype(jnp.float32)
        if dtype == "auto" or name in ("embedding", "positions"):  # of which few rows are read
            return array.astype(config.dtype)
        return quantize(array, 0, dtype)

    blocks = []
    for i in range(config.blocks):
        weights = jax.tree.map(lambda leaf: leaf[i], stacked)  # noqa: B023
        folded = _fold_block(config, weights, [part[i] for part in of_blocks])
        _check_all_taken({"blocks": weights})
        blocks.append({name: put(name, array) for name, array in folded.items()})
    kernel, bias = _behind_norm(left["final_norm"], left["logits"], *of_head)
    kernel = pad_to_multiple(kernel, 1, multiple)
    bias = None if bias is None else pad_to_multiple(bias, 0, multiple)
    embedding = left["embedding"].pop("embedding")
    positions = left["positions"].pop("embedding") if config.max_positions else None
    _check_all_taken(left)
    return Network(
        embedding=put("embedding", embedding),
        positions=None if positions is None else put("positions", positions),
        blocks=tuple(blocks),
        logits=put("logits", kernel),
        logits_bias=bias,
        config=config,
    )


def _check_all_taken(left: dict) -> None:
    """AssertionError if a part of the model was not folded: samples would silently differ."""
    paths = [path for path, _ in jax.tree.leaves_with_path(left)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    if names:
        raise AssertionError(f"parameters that sampling does not know: {', '.join(names)}")


def _behind_norm(norm: dict, linear: dict, shift, scale):
    """(kernel, bias) acting on the normed h as `linear` does on (h · norm + its bias) · (1 + scale)
    + shift. Removes what it uses from both."""
    kernel, bias, norm_bias = linear.pop("kernel"), linear.pop("bias", None), norm.pop("bias", None)
    rows = norm.pop("scale") * (1 + scale) * jnp.ones(len(kernel))
    if norm_bias is not None:
        shift = norm_bias * (1 + scale) + shift
    if jnp.ndim(shift):  # else there is none
        moved = jnp.tensordot(shift, kernel, 1)
        bias = moved if bias is None else bias + moved
    return rows.reshape(-1, *[1] * (kernel.ndim - 1)) * kernel, bias


def _fold_block(config, weights: dict, modulation) -> dict:
    """The weights of one block of a Network; removes what it uses from `weights`."""
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
    weights.pop("modulation", None)
    folded = {}
    qkv, qkv_bias = _behind_norm(weights["attention_norm"], weights["qkv"], shift, scale)
    queries = qkv.shape[2] - 2
    score = jnp.where(jnp.arange(queries + 2) < queries, config.score_scale, 1.0)[:, None]
    if config.qk_norm:  # the norm would undo a scale of the weights
        q, k = (weights[name].pop("scale") for name in ("q_norm", "k_norm"))
        folded["qk_norm_scale"] = jnp.stack([q] * queries + [k]) * score[:-1]
        score = jnp.ones_like(score)
    folded["qkv"] = qkv * score[None, None]
    folded["qkv_bias"] = None if qkv_bias is None else qkv_bias * score[None]
    folded["mlp_in"], folded["mlp_in_bias"] = _behind_norm(
        weights["mlp_norm"], weights["mlp_in"], mlp_shift, mlp_scale
    )
    for name, by in (("attention_out", gate), ("mlp_out", mlp_gate)):
        bias = weights[name].pop("bias", None)
        folded[name] = weights[name].pop("kernel") * _row(by)
        folded[f"{name}_bias"] = None if bias is None else bias * by
    return {name: array for name, array in folded.items() if array is not None}


def _row(gate):
    return gate if jnp.ndim(gate) == 0 else gate[None]


@dataclasses.dataclass(frozen=True)
class Window:
    """The input of a pass: W tokens of each row.

    Attributes:
      token, position, rank: int32 [B, W]; in_context: bool [B, W]: the four labels.
      filled: int32 [B]: all tokens read the slots of the cache below it.
      pick: int32 [B, P], the tokens of the window whose logits are computed.
    """

    token: jax.Array
    position: jax.Array
    rank: jax.Array
    in_context: jax.Array
    filled: jax.Array
    pick: jax.Array


def forward(network: Network, window: Window, cache: KVCache) -> tuple[jax.Array | None, Entries]:
    """One pass. The cache is read, not written.

    Returns:
      (logits float32 [B, P, V], mask token not excluded, or None if P = 0;
       the entries of the window, for cache.write.)
    """
    config = network.config
    project, residual = cache.projection, Residual(_embed(network, window))
    angles = rope.rope_angles(window.position, config)
    visible = Visible(window.rank, window.in_context, window.filled)
    pairs = []
    for i, block in enumerate(network.blocks):
        heads, h = _heads(config, project, block, residual, angles)
        a_BWGRK, pair = cache.attend(i, heads, visible)
        residual = _behind_attention(config, project, block, h, a_BWGRK)
        pairs.append(pair)
    if window.pick.shape[1] == 0:  # the attention of the last block is not computed
        return None, cache.pending(pairs, pairs[-1][0][:, 0, 0])
    head = Layer(network.logits, network.logits_bias, False, config)
    logits, h = project(residual.at(window.pick), head, jnp.float32)
    return logits[..., : config.vocab_size], cache.pending(pairs, h)


def _embed(network, window):
    h = network.embedding[window.token]
    if network.positions is None:
        return h
    # Masks behind the end of a text may have any position.
    return h + network.positions.at[window.position].get(mode="clip")


# Blocks have one shape, so JAX traces these once; the programs are the same.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _heads(config, project, block, residual, angles) -> tuple[Heads, jax.Array]:
    """(heads, the residual)"""
    cos, sin = (None, None) if angles is None else (part[:, 0] for part in angles)
    products, h = project(residual, Layer(block["qkv"], None, False, config))
    bias, scale = block.get("qkv_bias"), block.get("qk_norm_scale")
    return Heads(products, bias, scale, cos, sin, config=config), h


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _behind_attention(config, project, block, h_BWD, a_BWGRK) -> Residual:
    """The rest of a block, from its attention on."""
    attended = a_BWGRK.reshape(*h_BWD.shape[:2], -1).astype(h_BWD.dtype)
    out = project.product(attended, block["attention_out"])
    residual = Residual(h_BWD, out, block.get("attention_out_bias"))
    inner, h = project(residual, Layer(block["mlp_in"], block.get("mlp_in_bias"), True, config))
    return Residual(h, project.product(inner, block["mlp_out"]), block.get("mlp_out_bias"))
