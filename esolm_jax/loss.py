"""The loss of every objective: weighted cross-entropy, projecting only the tokens it predicts.

Tokens with a weight are brought to the front of each device's tokens and go through the head in
chunks of static size, as many as there is need for: no more than [chunk, V] logits are ever held.
The gradient is linear in the weights, so it is computed beside the loss, from the same logits: a
training step projects each predicted token once, and multiplies twice more.
"""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp

from esolm_jax import sharding
from esolm_jax.linear import Place


def exclude_mask_token(logits_BPV, mask_id: int):
    """float32 logits with −∞ for the mask token: it is an input, never a prediction."""
    is_mask_V = jnp.arange(logits_BPV.shape[-1]) == mask_id
    return jnp.where(is_mask_V[None, None], -jnp.inf, logits_BPV.astype(jnp.float32))


def token_nll(logits_BPV, target_BP, mask_id: int):
    """−log p(target), float32 [B, P] in nats, of logits. Targets are never the mask token."""
    logits_BPV = exclude_mask_token(logits_BPV, mask_id)
    target_logit = jnp.take_along_axis(logits_BPV, target_BP[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BPV, axis=-1) - target_logit


@dataclasses.dataclass(frozen=True)
class Head:
    """How the projection on the vocabulary computes: mask id, tokens a chunk, and its Place."""

    mask_id: int
    chunk: int
    place: Place

    @classmethod
    def of(cls, config, mask_id: int, mesh=None, *, chunk: int = 512):
        """Of a ModelConfig."""
        axes = sharding.PARAMETERS["logits/kernel"]
        return cls(mask_id, chunk, Place(axes, config.dtype, mesh))

    def at_most(self, tokens: int) -> Self:
        """With no chunk longer than all there is."""
        return dataclasses.replace(self, chunk=min(self.chunk, tokens))

    def gather(self, params):
        """This device's kernel [D, V'] in the compute dtype, bias [V'] and the ids [V'] they
        belong to."""
        kernel = self.place.gather(params["kernel"])
        size = kernel.shape[1]
        ids = jnp.arange(size)
        if self.place.splits("tensor"):
            ids += size * jax.lax.axis_index("tensor")
        return kernel, params.get("bias", jnp.zeros(size)), ids

    def normalised(self, h_CD, kernel, bias, ids, target_C):
        """nll [C], probabilities [C, V'] and which of them is the target's; all float32."""
        z = jnp.dot(h_CD, kernel, preferred_element_type=jnp.float32) + bias[None]
        z = jnp.where((ids == self.mask_id)[None], -jnp.inf, z)
        top = jnp.max(z, axis=1)
        if self.place.splits("tensor"):
            top = jax.lax.pmax(top, "tensor")
        e = jnp.exp(z - top[:, None])
        total = self.place.sum_over(["tensor"], jnp.sum(e, axis=1))
        is_target = ids[None] == target_C[:, None]
        target = self.place.sum_over(["tensor"], jnp.sum(jnp.where(is_target, z, 0), axis=1))
        return jnp.log(total) + top - target, e / total[:, None], is_target


def _predicted_first(head: Head, weight_n):
    """Indices of the n tokens, those with a weight first, filled up with n; and how many chunks
    hold them all, on every device."""
    n = len(weight_n)
    has = weight_n != 0
    size = -(-n // head.chunk) * head.chunk
    (order,) = jnp.nonzero(has, size=size, fill_value=n)
    count = jnp.sum(has)
    axes = tuple(axis for axis in sharding.AXES if head.place.splits(axis))
    if axes:
        count = jax.lax.pmax(count, axes)
    return order, -(-count // head.chunk)


def _chunk(head: Head, i, order, h_nD, target_n, weight_n):
    at = jax.lax.dynamic_slice_in_dim(order, i * head.chunk, head.chunk)
    fill = {"mode": "fill", "fill_value": 0}
    h = h_nD.at[at].get(**fill).astype(head.place.dtype)
    return at, h, target_n.at[at].get(**fill), weight_n.at[at].get(**fill)


def _nll(head: Head, h_nD, params, target_n, weight_n):
    """−log p(target) of the tokens with a weight, 0 for the others: float32 [n]."""
    head = head.at_most(len(h_nD))
    gathered = head.gather(params)
    order, trips = _predicted_first(head, weight_n)

    def body(i, nll_n):
        at, h, target, _ = _chunk(head, i, order, h_nD, target_n, weight_n)
        nll, _, _ = head.normalised(h, *gathered, target)
        return nll_n.at[at].set(nll, mode="drop")

    with jax.named_scope("predicted_chunks"):
        return jax.lax.fori_loop(0, trips, body, jnp.zeros(len(h_nD)))


def _loss_and_grads(head: Head, h_nD, params, target_n, weight_n):
    """Σ weight · nll on this device, and its gradients: float32, dh in the dtype of h."""
    head = head.at_most(len(h_nD))
    kernel, bias, ids = head.gather(params)
    order, trips = _predicted_first(head, weight_n)

    def body(i, carry):
        loss, dh_nD, dk, db = carry
        at, h, target, weight = _chunk(head, i, order, h_nD, target_n, weight_n)
        nll, p, is_target = head.normalised(h, kernel, bias, ids, target)
        dz = (p - is_target) * weight[:, None]
        low = dz.astype(kernel.dtype)
        dh = jnp.dot(low, kernel.T, preferred_element_type=jnp.float32)
        dk += jnp.dot(h.T, low, preferred_element_type=jnp.float32)
        dh_nD = dh_nD.at[at].set(dh.astype(dh_nD.dtype), mode="drop")
        return loss + jnp.sum(weight * nll), dh_nD, dk, db + jnp.sum(dz, axis=0)

    dk = jnp.zeros(kernel.shape, jnp.float32)
    carry = jnp.zeros(()), jnp.zeros_like(h_nD), dk, jnp.zeros(bias.shape)
    with jax.named_scope("predicted_chunks"):
        loss, dh_nD, dk, db = jax.lax.fori_loop(0, trips, body, carry)
    batch = [*sharding.ROWS, "sequence"]
    loss = head.place.sum_over(batch, loss)
    grads = {"kernel": head.place.scatter(dk), "bias": head.place.sum_over(batch, db)}
    return loss, head.place.sum_over(["tensor"], dh_nD), {name: grads[name] for name in params}


def _flat(function, head: Head, h_BPD, params, target_BP, weight_BP):
    batch, length, width = h_BPD.shape
    return function(
        head,
        h_BPD.reshape(batch * length, width),
        params,
        target_BP.reshape(-1),
        weight_BP.reshape(-1),
    )


def _specs(params):
    axes = {"kernel": sharding.PARAMETERS["logits/kernel"], "bias": ("vocab",)}
    return {name: sharding.spec(*axes[name]) for name in params}


def _run(head: Head, body, out_specs, h, params, target, weight):
    tokens = sharding.spec("rows", "tokens")
    specs = (sharding.spec("rows", "tokens", None), _specs(params), tokens, tokens)
    return head.place.run(body, specs, out_specs, h, params, target, weight)


def nll(head: Head, h_BPD, params, target_BP, weight_BP):
    """−log p(target) of the tokens with a weight, 0 for the others: float32 [B, P], in nats.

    Args:
      h_BPD: what the head projects (Transformer with head=False). params: {"kernel": [D, V],
        "bias": [V] or absent}. target_BP: int32, never the mask token where there is a weight.
    """

    def body(h, *rest):
        return _flat(_nll, head, h, *rest).reshape(h.shape[:2])

    return _run(head, body, sharding.spec("rows", "tokens"), h_BPD, params, target_BP, weight_BP)


def sequence_nll(head: Head, h_BPD, params, target_BP, weight_BP):
    """Σ over a row's tokens of weight · (−log p(target)): float32 [B] in nats. Not to be
    differentiated: that is weighted_nll's."""
    return jnp.sum(weight_BP * nll(head, h_BPD, params, target_BP, weight_BP), axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_nll(head: Head, h_BPD, params, target_BP, weight_BP):
    """Σ weight · (−log p(target)) over all rows and tokens: float32 scalar, differentiable in
    h_BPD and params."""
    return jnp.sum(sequence_nll(head, h_BPD, params, target_BP, weight_BP))


def _forward(head: Head, h_BPD, params, target_BP, weight_BP):
    def body(h, *rest):
        loss, dh, grads = _flat(_loss_and_grads, head, h, *rest)
        return loss, dh.reshape(h.shape), grads

    out_specs = sharding.spec(), sharding.spec("rows", "tokens", None), _specs(params)
    loss, dh, grads = _run(head, body, out_specs, h_BPD, params, target_BP, weight_BP)
    return loss, (dh, grads)


def _backward(head: Head, saved, g):
    del head
    dh, grads = jax.tree.map(lambda a: (g * a).astype(a.dtype), saved)
    return dh, grads, None, None


weighted_nll.defvjp(_forward, _backward)
