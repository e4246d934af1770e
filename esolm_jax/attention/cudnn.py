"""Attention by cuDNN on NVIDIA GPUs, for layouts without query copies.

cuDNN has two of the masks that the rule leads to: tokens that read those before them (ar, and the
diffusion phase of eso_b, whose tokens are in generation order), and tokens that all read each other
(mdlm, mdlm_shifted). Any other would take a bias for every pair. Padding comes last in both: no
token reads it in the first, and a length for each row hides it in the second.

Tests compare the masks with the rule by JAX's own implementation of the same function; the kernels
themselves run on GPUs only (`python -m benchmarks.attention` prints their errors and times).
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from esolm_jax.attention.recompute import pad_to_multiple
from esolm_jax.errors import UserError
from esolm_jax.family.labels import Layout

WIDTH_MULTIPLE = 8  # of the width of a head


def has_mask(layout: Layout | None) -> bool:
    """Whether cuDNN has a mask for the tokens of this layout."""
    if layout is None or layout.queries:
        return False
    return layout.block == 1 or layout.block >= layout.length


def cudnn(q_BHTK, k_BGSK, v_BGSK, *labels, layout: Layout, interpret: bool = False):
    """Attention over labels of this layout, [B, H, T, K] in the dtype of v; see `attend`.

    Args:
      q_BHTK, k_BGSK, v_BGSK: bfloat16 or float16, all tokens of the layout; K <= kinds.CUDNN_WIDTH.
      labels: q_rank, q_in_context [B, T], k_rank, k_in_context [B, S].
      layout: one that `has_mask`.
      interpret: compute the same by XLA, on any device and in any dtype.

    Raises UserError if cuDNN is not installed.
    """
    width = q_BHTK.shape[-1]
    run = functools.partial(
        jax.nn.dot_product_attention,
        scale=width**-0.5,
        is_causal=layout.block == 1,
        implementation="xla" if interpret else "cudnn",
    )
    lengths = None
    if layout.block != 1:
        k_rank = labels[2]  # the layout's, except for padding
        real = k_rank == layout.labels(jnp.arange(layout.length))[0][None]
        # Rows of padding alone, which nothing reads, see one key.
        lengths = jnp.maximum(jnp.sum(real, axis=1, dtype=jnp.int32), 1)
    tokens_first = (
        pad_to_multiple(jnp.moveaxis(a, 2, 1), 3, WIDTH_MULTIPLE) for a in (q_BHTK, k_BGSK, v_BGSK)
    )
    try:
        out_BTHK = _attend(run, *tokens_first, lengths)
    except RuntimeError as error:
        if not str(error).startswith("cuDNN"):  # is not detected, or not found
            raise
        raise UserError(
            "config.model.attention='cudnn': must be another, because cuDNN is not installed; "
            "the extras cuda12 and cuda13 bring it"
        ) from error
    return jnp.moveaxis(out_BTHK, 1, 2)[..., :width]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(run, q_BTHK, k_BSGK, v_BSGK, lengths):
    """`run`, whose residuals have a name: under remat, the forward pass is not run twice."""
    return run(q_BTHK, k_BSGK, v_BSGK, key_value_seq_lengths=lengths)


def _forward(run, q_BTHK, k_BSGK, v_BSGK, lengths):
    masked = functools.partial(run, key_value_seq_lengths=lengths)
    out, pull = jax.vjp(masked, q_BTHK, k_BSGK, v_BSGK)
    operands = q_BTHK, k_BSGK, v_BSGK  # which other names keep

    def named(residual):  # for model.REMAT
        is_operand = any(residual is a for a in operands)
        return residual if is_operand else checkpoint_name(residual, "attention")

    return checkpoint_name(out, "attention"), jax.tree.map(named, pull)


def _backward(run, pull, grad_BTHK):
    del run
    return *pull(grad_BTHK), None


_attend.defvjp(_forward, _backward)
