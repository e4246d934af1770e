"""The NELBO as the published code sums it, from given noise: κ-split for Eso-LM, plain for others.

`evaluate` gives every window both terms of Eso-LM's NELBO. The published code splits each
evaluation batch: the first floor(κ · rows) rows feed the diffusion term alone, the other rows the
sequential term alone. Both have the same expectation for batches of equal size without padding;
the split has the larger variance.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.family import ar, bd3, eso_a, eso_b, mdlm, noise
from esolm_jax.family.labels import LabelledBatch
from esolm_jax.model.lm_head import Head
from esolm_jax.model.lm_head import nll as lm_head_nll


@dataclasses.dataclass(frozen=True)
class Noise:
    """The noise of one term: of the diffusion term at times t, or of the sequential term.

    Attributes:
      masked: bool [B, L], in text order.
      order_BL: int32 [B, L], the position at each rank of the generation order; None for MDLM.
      t_B: float32 [B], the time of each row; None for the sequential term.
    """

    masked: np.ndarray
    order_BL: np.ndarray | None = None
    t_B: np.ndarray | None = None


_ESO = {"eso_a": eso_a, "eso_b": eso_b}


def label(objective: str, x: Any, noise_: Noise, *, alpha_0: float, mask: int) -> LabelledBatch:
    """Labelled tokens of one term of eso_a, eso_b or mdlm.

    As in the published code, padding is an ordinary token of the model: it is masked, ordered and
    read like others. Only the sums leave it out.
    """
    masked, valid = noise_.masked, np.ones(x.shape, bool)
    if noise_.t_B is None:
        settings = (x, valid, masked, noise_.order_BL, masked)
        return _ESO[objective].label_sequential(*settings, mask=mask)
    weight = jnp.where(masked, noise.elbo_weight(noise_.t_B[:, None], alpha_0), 0)
    if objective == "mdlm":
        return mdlm.label(x, valid, masked, weight, mask=mask)
    order_BL = noise_.order_BL
    return _ESO[objective].label_diffusion(x, valid, masked, order_BL, weight, mask=mask)


def label_ar(x: Any, start: int | None) -> LabelledBatch:
    """Labelled tokens of AR behind a start token (published: `bos` or `mask`). None: the first
    token of each row is the start token and is not predicted (published: `none`)."""
    if start is None:
        return ar.label(x[:, 1:], np.ones(x[:, 1:].shape, bool), start=x[:, :1])
    return ar.label(x, np.ones(x.shape, bool), start=start)


def draw_bd3(
    key: jax.Array, num_rows: Any, shape: tuple[int, int], block_length: int
) -> tuple[jax.Array, jax.Array]:
    """The noise of the published BD3-LM code: bool and float32 [B, L], masks and times.

    Each block has its own time t in [ε, 1], stratified over the blocks of the first `num_rows`
    rows, and is masked with probability t. The first token is never masked (ignore_bos).
    """
    key_time, key_mask = jax.random.split(key)
    rows, length = shape
    blocks = length // block_length
    stratum = jnp.arange(rows * blocks).reshape(rows, blocks)
    u = (stratum + jax.random.uniform(key_time, (rows, blocks))) / (num_rows * blocks) % 1.0
    t_BL = jnp.repeat(noise.EPS + (1 - noise.EPS) * u, block_length, axis=1)
    masked = jax.random.uniform(key_mask, shape) <= t_BL
    return masked.at[:, 0].set(False), t_BL


def label_bd3(x: Any, masked: Any, t_BL: Any, *, mask: int, block_length: int) -> LabelledBatch:
    """Labelled tokens of BD3-LM with noise of draw_bd3; the weight of a masked token is 1 / t."""
    weight = jnp.where(masked, 1 / t_BL, 0)
    settings = {"mask": mask, "block_length": block_length}
    return bd3.label(x, np.ones(x.shape, bool), masked, weight, **settings)


def token_nll(
    apply: Callable, head: Head, params: dict, labelled: LabelledBatch, order_BL: Any = None
) -> jax.Array:
    """weight · (−log p) of each token, in text order: float32 [B, P].

    Args:
      apply, head, params: of a model, as in `build.BuiltModel`.
      order_BL: the generation order of `labelled`; None: text order.
    """
    at = (0, labelled.target.shape[1])
    hidden = apply(params, labelled.tokens, predict=at, head=False)
    operands = (hidden,), params["logits"], (labelled.target,), (labelled.weight,)
    weighted = labelled.weight * lm_head_nll(head, *operands)[0]
    if order_BL is None:
        return weighted
    return jnp.take_along_axis(weighted, jnp.argsort(order_BL, axis=1), axis=1)


def diffusion_rows(num_rows: int, kappa: float) -> int:
    """floor(κ · rows): how many rows of a batch feed the diffusion term.

    Raises:
      UserError: no row would, although κ > 0. The published code fails there too, such as for a
        last batch of one row at κ = 0.5.
    """
    rows = math.floor(kappa * num_rows)
    if kappa > 0 and not rows:
        raise UserError(f"kappa={kappa}: leaves no row of a batch of {num_rows} for the diffusion")
    return rows


@dataclasses.dataclass(frozen=True)
class BatchNelbo:
    """Sums of one evaluation batch, in nats: D over d tokens, S over s tokens.

    `nll` is what the published code accumulates, (D/d + S/s) · d, over `num_tokens` = d (over s if
    there is no diffusion term). The tokens of the sequential rows never count as weight, so a short
    or padded batch shifts the mean.
    """

    diffusion: float = 0.0
    diffusion_tokens: int = 0
    sequential: float = 0.0
    sequential_tokens: int = 0

    @classmethod
    def of(cls, valid: Any, diffusion_nll: Any = None, sequential_nll: Any = None) -> Self:
        """Of one batch. valid: bool [B, L]; the nll of its first rows and of the others, [·, L] in
        text order; None: no rows."""
        rows = 0 if diffusion_nll is None else len(diffusion_nll)
        diffusion = _sums(diffusion_nll, valid[:rows])
        return cls(*diffusion, *_sums(sequential_nll, valid[rows:]))

    @property
    def num_tokens(self) -> int:
        return self.diffusion_tokens or self.sequential_tokens

    @property
    def loss(self) -> float:
        """D/d + S/s."""
        terms = (self.diffusion, self.diffusion_tokens), (self.sequential, self.sequential_tokens)
        return sum(nll / tokens for nll, tokens in terms if tokens)

    @property
    def nll(self) -> float:
        return self.loss * self.num_tokens

    @property
    def sequential_term(self) -> float:
        """The part of `nll` that the sequential term makes."""
        if not self.sequential_tokens:
            return 0.0
        return self.sequential / self.sequential_tokens * self.num_tokens


def _sums(nll: Any, valid: Any) -> tuple[float, int]:
    """Of the tokens that are not padding: Σ nll and how many. nll may lack the first column (AR
    without a start token)."""
    if nll is None:
        return 0.0, 0
    kept = np.asarray(valid, bool)[:, -nll.shape[1] :]
    return float(np.sum(np.asarray(nll, np.float64)[kept])), int(kept.sum())


def importance_weighted(log_p_BO: Any) -> float:
    """−Σ over rows of log mean_k exp(log p_k), in nats, as the published code takes it: it draws
    one set of K orders for *all rows of a batch*, masks everything, and ignores padding.

    The tokens of the batch are rows · L. log_p_BO: float [B, K], log p of each row and order.
    """
    log_p_BO = np.asarray(log_p_BO, np.float64)
    log_mean_B = np.logaddexp.reduce(log_p_BO, axis=1) - math.log(log_p_BO.shape[1])
    return float(-log_mean_B.sum())


def nelbo_figures(batches: Iterable[BatchNelbo]) -> dict[str, float]:
    """Figures of an evaluation: nll (nats per token), perplexity, bits_per_token, and
    sequential_bits_per_token, the part of the sequential term."""
    batches = list(batches)
    tokens = sum(batch.num_tokens for batch in batches)
    if not tokens:
        raise UserError("batches: must have at least one token")
    nll = sum(batch.nll for batch in batches) / tokens
    sequential = sum(batch.sequential_term for batch in batches) / tokens
    return {
        "nll": nll,
        "perplexity": math.exp(nll),
        "bits_per_token": nll / math.log(2),
        "sequential_bits_per_token": sequential / math.log(2),
    }
