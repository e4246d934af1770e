"""Attention under the rule of labels: every implementation behind one signature.

dense materializes the scores of all pairs: the reference. chunked is XLA in linear memory, for any
labels on any device. flash are block-sparse GPU kernels for any labels. cudnn is NVIDIA's library,
for layouts without query copies. splash is a block-sparse TPU kernel for labels that follow from a
layout.
"""

import functools

import jax
from jax.sharding import Mesh

from esolm_jax.attention import kinds
from esolm_jax.attention.dense import dense
from esolm_jax.family.labels import Layout, Tokens
from esolm_jax.family.rule import dense_mask
from esolm_jax.parallel import sharding

KINDS = (*kinds.KINDS, *kinds.INTERPRETED)
SHORT = 128  # L up to which chunked computes fewer pairs than splash's smallest blocks


def resolve(kind: str, platform: str, length: int) -> str:
    """The kind that "auto" stands for, for texts of L = `length` on a platform ("cpu", "gpu",
    "tpu"); other kinds unchanged. On an H200, flash takes a third of chunked's time."""
    if kind != "auto":
        return kind
    if platform == "gpu":
        return "flash"
    return "splash" if platform == "tpu" and length > SHORT else "chunked"


def attend(
    q_BHTK,
    k_BGSK,
    v_BGSK,
    queries: Tokens,
    keys: Tokens,
    *,
    kind: str = "dense",
    mesh: Mesh | None = None,
):
    """Softmax attention under the rule of labels, scale 1/√K, softmax in float32.

    Invisible keys have probability exactly zero and do not change a single bit of the result.
    Query head h reads key/value head h // (H // G).

    Args:
      q_BHTK, k_BGSK, v_BGSK: queries, keys, values; G divides H.
      queries, keys: the labels of the T queries and S keys. All kinds but dense are
        self-attention: `keys` are `queries`.
      kind: one of KINDS. splash needs `queries.layout`; without one, chunked runs instead. Where
        cudnn has no mask for the layout, the tokens are sharded, or the arrays are float32, flash
        runs instead.
      mesh: if given, q, k, v are sharded over it by sharding.RULES: rows, heads and tokens; keys
        and values are gathered over `sequence` inside.

    Returns:
      [B, H, T, K] in the dtype of v. Outputs at padding positions are unspecified.

    Raises:
      ValueError: an unknown kind; for splash, a number of tokens that differs from the layout's.
    """
    if kind not in KINDS:
        raise ValueError(f"attention kind {kind!r}: must be one of {', '.join(KINDS)}")
    if kind == "dense":
        return dense(q_BHTK, k_BGSK, v_BGSK, dense_mask(queries, keys))
    across = None if mesh is None or mesh.shape["sequence"] == 1 else "sequence"
    if kind == "cudnn" and v_BGSK.dtype.itemsize > 2:  # such as a judge, which computes in float32
        kind = "flash"
    attention = _implementation(kind, queries.layout, sharding.device(mesh), across)
    if mesh is not None:
        attention = _on_mesh(attention, mesh, across)
    labels = queries.rank, queries.in_context, keys.rank, keys.in_context
    with jax.named_scope("attend"):  # aot/report.py finds its products by this name
        return attention(q_BHTK, k_BGSK, v_BGSK, *labels)


def _implementation(kind: str, layout: Layout | None, device: jax.Device, across: str | None):
    """The function (q, k, v, *labels) → [B, H, T, K] of a kind. Kernels are imported on first use:
    importing Pallas takes a second."""
    interpret = kind.endswith("_interpret")
    # The local indices of a shard of the queries do not follow the layout.
    local_layout = None if across else layout
    if kind.startswith("cudnn"):
        from esolm_jax.attention.cudnn import cudnn, has_mask

        if has_mask(local_layout):
            return functools.partial(cudnn, layout=local_layout, interpret=interpret)
    if kind.startswith(("flash", "cudnn")):
        from esolm_jax.attention.flash import capability, flash

        options = {"capability": capability(device), "interpret": interpret}
        return functools.partial(flash, layout=local_layout, **options)
    if kind.startswith("splash") and layout is not None:
        from esolm_jax.attention.splash import splash

        return functools.partial(splash, layout=layout, across=across, interpret=interpret)
    if kind == "chunked" or kind.startswith("splash"):
        from esolm_jax.attention.chunked import chunked

        return functools.partial(chunked, layout=local_layout, platform=device.platform)
    raise NotImplementedError(f"attention kind {kind!r}: has no branch in attend.py")


def _on_mesh(attention, mesh: Mesh, across: str | None):
    """`attention` on each device's rows, heads and queries, over all keys of the row."""

    def local(q_BHTK, k_BGSK, v_BGSK, *labels):
        if across:  # the transpose of gathering keys is the reduce-scatter of their gradients
            gather = functools.partial(jax.lax.all_gather, axis_name=across, axis=2, tiled=True)
            k_BGSK, v_BGSK = gather(k_BGSK), gather(v_BGSK)
        return attention(q_BHTK, k_BGSK, v_BGSK, *labels)

    split = sharding.spec("rows", "heads", "tokens", None)
    of_queries, of_keys = sharding.spec("rows", "tokens"), sharding.spec("rows", None)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, split, split, of_queries, of_queries, of_keys, of_keys),
        out_specs=split,
        check_vma=False,  # Pallas kernels do not declare over which axes their results vary
    )
