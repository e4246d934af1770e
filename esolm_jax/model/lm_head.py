"""The loss of every objective: weighted cross-entropy, projecting only the tokens it predicts.

Each device moves its tokens with a weight to the front and runs the head on chunks of static size
until all of them are done, so at most [chunk, V] logits exist at a time. The gradient is linear in
the weights and is computed with the loss, from the same logits: a training step projects each
predicted token once and needs two more matmuls.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from esolm_jax.attention.recompute import pad_to_multiple
from esolm_jax.model import row_sums
from esolm_jax.model.linear import ParamSpec
from esolm_jax.parallel import sharding


def exclude_mask_token(logits_BPV, mask_id: int):
    """float32 logits with −∞ for the mask token: it is an input, never a prediction."""
    is_mask_V = jnp.arange(logits_BPV.shape[-1]) == mask_id
    return jnp.where(is_mask_V[None, None], -jnp.inf, logits_BPV.astype(jnp.float32))


def token_nll(logits_BPV, target_BP, mask_id: int):
    """−log p(target), float32 [B, P] in nats, of logits. Targets are never the mask token."""
    logits_BPV = exclude_mask_token(logits_BPV, mask_id)
    target_logit = jnp.take_along_axis(logits_BPV, target_BP[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BPV, axis=-1) - target_logit


SMALLEST_CHUNK = 512  # where all chunks are this small, half of the last one costs little
CHUNKS = 8  # of all tokens, predicted or not: each reads and writes the gradient of the kernel
LOGITS_BYTES = {"gpu": 2**30, "tpu": 2**28}  # of a chunk at most
LANES = 128  # a GPU's matrix products want whole ones


@dataclasses.dataclass(frozen=True)
class Head:
    """The projection on the vocabulary: mask id, tokens of a chunk (0 = sized to the device and
    the batch), and the spec of the kernel."""

    mask_id: int
    chunk: int
    spec: ParamSpec

    @classmethod
    def of(cls, config, mask_id: int, mesh=None, *, chunk: int = 0):
        """The head of a ModelConfig."""
        axes = sharding.PARAMETERS["logits/kernel"]
        return cls(mask_id, chunk, ParamSpec(axes, config.dtype, mesh))

    def sized(self, tokens: int, vocab: int) -> Self:
        """The same head with chunks for `tokens` tokens, predicted or not, of a device that holds
        `vocab` columns of the kernel."""
        chunk = self.chunk or SMALLEST_CHUNK
        largest = LOGITS_BYTES.get(sharding.platform(self.spec.mesh), 0) // (4 * vocab)
        if not self.chunk:
            share = -(-tokens // CHUNKS)
            chunk = max(chunk, min(-(-share // LANES), largest // LANES) * LANES)
        return dataclasses.replace(self, chunk=min(chunk, tokens))

    def gather(self, params):
        """This device's kernel [D, V'] in the compute dtype, bias [V'] and their token ids [V'].
        On a GPU, with columns to whole lanes that are never predicted, as if all were the mask."""
        kernel = self.spec.gather(params["kernel"])
        size = kernel.shape[1]
        ids, bias = jnp.arange(size), params.get("bias", jnp.zeros(size))
        if self.spec.splits("tensor"):
            ids += size * jax.lax.axis_index("tensor")
        if sharding.platform(self.spec.mesh) == "gpu":
            kernel, bias = (pad_to_multiple(a, a.ndim - 1, LANES) for a in (kernel, bias))
            ids = pad_to_multiple(ids, 0, LANES, constant_values=self.mask_id)
        return kernel, bias, ids

    def normalize(self, h_PD, kernel, bias, ids, target_P):
        """nll [P] and probabilities [P, V'], float32, and is_target, bool [P, V']."""
        z = jnp.dot(h_PD, kernel, preferred_element_type=jnp.float32) + bias[None]
        z = jnp.where((ids == self.mask_id)[None], -jnp.inf, z)
        is_target = ids[None] == target_P[:, None]
        of_target = jnp.where(is_target, z, 0)
        platform = sharding.platform(self.spec.mesh)
        own_top, total, target = row_sums.softmax_statistics(z, of_target, platform)
        top = self._max(own_top)
        total = total * jnp.exp(own_top - top)
        total, target = (self.spec.sum_over(["tensor"], s) for s in (total, target))
        p = jnp.exp(z - top[:, None]) / total[:, None]
        return jnp.log(total) + top - target, p, is_target

    def _max(self, own_P):
        """Over the devices that split the vocabulary."""
        return jax.lax.pmax(own_P, "tensor") if self.spec.splits("tensor") else own_P


def _predicted_first(head: Head, weight_n):
    """Indices of the tokens with a weight, padded with n, and the number of chunks with such tokens
    on any device."""
    n = len(weight_n)
    has = weight_n != 0
    size = -(-n // head.chunk) * head.chunk
    (order,) = jnp.nonzero(has, size=size, fill_value=n)
    count = jnp.sum(has)
    axes = tuple(axis for axis in sharding.AXES if head.spec.splits(axis))
    if axes:
        count = jax.lax.pmax(count, axes)
    return order, -(-count // head.chunk)


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """The tokens of all batches, one after another."""

    h_nD: jax.Array
    target_n: jax.Array
    weight_n: jax.Array


def _chunk(head: Head, i, order, tokens: _Tokens):
    index = jax.lax.dynamic_slice_in_dim(order, i * head.chunk, head.chunk)
    zero = {"mode": "fill", "fill_value": 0}  # for padding
    h = tokens.h_nD.at[index].get(**zero).astype(head.spec.dtype)
    return index, h, tokens.target_n.at[index].get(**zero), tokens.weight_n.at[index].get(**zero)


def _of_each_token(head: Head, params, tokens: _Tokens, of_chunk: Callable, count: int):
    """The `count` results of of_chunk(head, h, gathered, target) for the tokens with a weight, 0
    for the others: tuple of float32 [n]."""
    head = head.sized(len(tokens.h_nD), params["kernel"].shape[1])
    gathered = head.gather(params)
    order, trips = _predicted_first(head, tokens.weight_n)

    def body(i, found):
        index, h, target, _ = _chunk(head, i, order, tokens)
        values = of_chunk(head, h, gathered, target)
        pairs = zip(found, values, strict=True)
        return tuple(a.at[index].set(value, mode="drop") for a, value in pairs)

    with jax.named_scope("predicted_chunks"):
        zeros = (jnp.zeros(len(tokens.h_nD)),) * count
        return jax.lax.fori_loop(0, trips, body, zeros)


def _chunk_nll(head: Head, h_PD, gathered, target_P):
    return (head.normalize(h_PD, *gathered, target_P)[0],)


def _chunk_statistics(head: Head, h_PD, gathered, target_P):
    """The fields of TokenStatistics."""
    nll, p, is_target = head.normalize(h_PD, *gathered, target_P)
    top = head._max(jnp.max(p, axis=1))
    of_target, entropy = jnp.where(is_target, p, 0), jax.scipy.special.entr(p)
    sums = row_sums.sum_rows(of_target, entropy, platform=sharding.platform(head.spec.mesh))
    of_target, entropy = (head.spec.sum_over(["tensor"], s) for s in sums)
    return nll, top, (of_target >= top).astype(jnp.float32), entropy


def _loss_and_grads(head: Head, params, tokens: _Tokens, batch_n, num_batches: int):
    """Σ weight · nll of each batch, and the gradients of their sum: float32, dh in h's dtype."""
    head = head.sized(len(tokens.h_nD), params["kernel"].shape[1])
    kernel, bias, ids = head.gather(params)
    order, trips = _predicted_first(head, tokens.weight_n)

    def body(i, carry):
        losses, dh_nD, dk, db = carry
        index, h, target, weight = _chunk(head, i, order, tokens)
        nll, p, is_target = head.normalize(h, kernel, bias, ids, target)
        dz = (p - is_target) * weight[:, None]
        low = dz.astype(kernel.dtype)
        dh = jnp.dot(low, kernel.T, preferred_element_type=jnp.float32)
        dk += jnp.dot(h.T, low, preferred_element_type=jnp.float32)
        dh_nD = dh_nD.at[index].set(dh.astype(dh_nD.dtype), mode="drop")
        # Padding may have no finite nll: its target, 0, may be the mask token.
        weighted = jnp.where(weight == 0, 0, weight * nll)
        # Sum chunk by chunk: a sequential sum over a large batch loses three digits.
        mine = batch_n.at[index].get(mode="clip")[None] == jnp.arange(num_batches)[:, None]
        losses += jnp.sum(jnp.where(mine, weighted[None], 0), axis=1)
        return losses, dh_nD, dk, db + jnp.sum(dz, axis=0)

    dk = jnp.zeros(kernel.shape, jnp.float32)
    carry = jnp.zeros(num_batches), jnp.zeros_like(tokens.h_nD), dk, jnp.zeros(bias.shape)
    with jax.named_scope("predicted_chunks"):
        losses, dh_nD, dk, db = jax.lax.fori_loop(0, trips, body, carry)
    batch = [*sharding.ROWS, "sequence"]
    losses = head.spec.sum_over(batch, losses)
    size = params["kernel"].shape[1]
    grads = {
        "kernel": head.spec.scatter(dk[:, :size]),
        "bias": head.spec.sum_over(batch, db[:size]),
    }
    return losses, head.spec.sum_over(["tensor"], dh_nD), {name: grads[name] for name in params}


def _flat(arrays):
    """[B, P, …] of each batch → [n, …] of all of them."""
    return jnp.concatenate([a.reshape(-1, *a.shape[2:]) for a in arrays])


def _starts(arrays) -> list[int]:
    """Where all batches but the first begin in _flat(arrays)."""
    sizes = [a.shape[0] * a.shape[1] for a in arrays]
    return [sum(sizes[:i]) for i in range(1, len(sizes))]


def _batch_of_each(arrays):
    """The index of the batch of each entry of _flat(arrays): int32 [n]. Not jnp.repeat, whose
    cumulative sum over all tokens XLA computes at compile time, in quadratic time."""
    index = jnp.arange(sum(a.shape[0] * a.shape[1] for a in arrays))
    return sum((jnp.int32(index >= start) for start in _starts(arrays)), jnp.zeros_like(index))


def _unflat(array, like):
    """The inverse of _flat."""
    parts = jnp.split(array, _starts(like))
    return tuple(p.reshape(*a.shape[:2], *p.shape[1:]) for p, a in zip(parts, like, strict=True))


def _specs(params):
    axes = {"kernel": sharding.PARAMETERS["logits/kernel"], "bias": ("vocab",)}
    return {name: sharding.spec(*axes[name]) for name in params}


def _run(head: Head, body, out_specs, operands: tuple):
    """`operands`: hs, params, targets, weights."""
    tokens = sharding.spec("rows", "tokens")
    specs = (sharding.spec("rows", "tokens", None), _specs(operands[1]), tokens, tokens)
    return head.spec.run(body, specs, out_specs, *operands)


def nll(head: Head, hs, params, targets, weights):
    """−log p(target) of the tokens with a weight, 0 for the others: in nats, float32 [B, P] of
    each batch.

    Args:
      hs: tuple of [B, P, D], the inputs of the head (Transformer with head=False).
      params: {"kernel": [D, V], "bias": [V] or absent}.
      targets, weights: tuples of [B, P]; no target is the mask token where it has a weight.
    """

    def body(hs, params, targets, weights):
        tokens = _Tokens(_flat(hs), _flat(targets), _flat(weights))
        (found,) = _of_each_token(head, params, tokens, _chunk_nll, 1)
        return _unflat(found, hs)

    operands = hs, params, targets, weights
    return _run(head, body, sharding.spec("rows", "tokens"), operands)


class TokenStatistics(NamedTuple):
    """Predicted distributions: float32 [B, P] each, 0 for tokens without a weight.

    Attributes:
      nll: −log p(target), in nats. confidence: the largest probability.
      is_top: 1 where the target has the largest probability. entropy: in nats.
    """

    nll: jax.Array
    confidence: jax.Array
    is_top: jax.Array
    entropy: jax.Array


def token_statistics(head: Head, hs, params, targets, weights) -> tuple[TokenStatistics, ...]:
    """TokenStatistics of each batch. Arguments are those of `nll`."""

    def body(hs, params, targets, weights):
        tokens = _Tokens(_flat(hs), _flat(targets), _flat(weights))
        count = len(TokenStatistics._fields)
        found = _of_each_token(head, params, tokens, _chunk_statistics, count)
        return tuple(_unflat(values, hs) for values in found)

    operands = hs, params, targets, weights
    fields = _run(head, body, sharding.spec("rows", "tokens"), operands)
    return tuple(TokenStatistics(*batch) for batch in zip(*fields, strict=True))


def sequence_nll(head: Head, hs, params, targets, weights):
    """Σ over a row's tokens of weight · (−log p(target)): in nats, float32 [B] of each batch. Not
    differentiable; see weighted_nll."""
    nlls = nll(head, hs, params, targets, weights)
    return tuple(jnp.sum(w * n, axis=1) for w, n in zip(weights, nlls, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_nll(head: Head, hs, params, targets, weights):
    """Σ weight · (−log p(target)) over the rows and tokens of each batch: float32 [batches].

    Differentiable in hs and params for the *sum* over batches: all batches must have one scale.
    """
    return jnp.stack([jnp.sum(n) for n in sequence_nll(head, hs, params, targets, weights)])


def _forward(head: Head, hs, params, targets, weights):
    def body(hs, params, targets, weights):
        tokens = _Tokens(_flat(hs), _flat(targets), _flat(weights))
        losses, dh, grads = _loss_and_grads(head, params, tokens, _batch_of_each(hs), len(hs))
        return losses, _unflat(dh, hs), grads

    out_specs = sharding.spec(), sharding.spec("rows", "tokens", None), _specs(params)
    losses, dhs, grads = _run(head, body, out_specs, (hs, params, targets, weights))
    return losses, (dhs, grads)


def _backward(head: Head, saved, g):
    del head
    dhs, grads = jax.tree.map(lambda a: (g[0] * a).astype(a.dtype), saved)
    return dhs, grads, None, None


weighted_nll.defvjp(_forward, _backward)
