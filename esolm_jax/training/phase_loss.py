"""The loss of a labelled batch and its gradient: all phases, in micro-batches."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from esolm_jax.family import trim
from esolm_jax.family.labels import LabelledBatch
from esolm_jax.family.phase import Phase
from esolm_jax.model import transformer
from esolm_jax.model.lm_head import Head, weighted_nll
from esolm_jax.parallel import sharding


def label_batch(phases: Sequence[Phase], key, x, valid) -> tuple[LabelledBatch, ...]:
    """Shares the rows of a global batch out among the phases, by their fractions, and labels them.

    Noise is drawn for the whole global batch: micro-batches are slices of the result, so each
    has its own noise and their summed gradients are those of one large batch.
    """
    labelled, begin = [], 0
    for i, phase in enumerate(phases):
        end = begin + round(phase.fraction * x.shape[0])
        labelled.append(phase.label(jax.random.fold_in(key, i), x[begin:end], valid[begin:end]))
        begin = end
    return tuple(labelled)


@dataclasses.dataclass(frozen=True)
class PhaseLoss:
    """The objective of a training step, and its settings.

    Attributes:
      apply: the function of model.bind. head: the projection on the vocabulary.
      rare_apply: the same for batches that do not fit the trimmed pass; None = `apply`.
      queries: for each phase, how many query copies a row keeps (trim.py), or None: all tokens.
      accumulation: micro-batches. mesh: None = one device.
    """

    apply: Callable
    head: Head
    queries: tuple[int | None, ...]
    accumulation: int = 1
    mesh: jax.sharding.Mesh | None = None
    rare_apply: Callable | None = None

    def losses(self, params, labelled, num_tokens, dropout_key=None):
        """Σ weight · (−log p) / num_tokens of each phase: float32 [phases], in nats per token.

        `num_tokens` are the phases' token counts in the *global* batch, even if `labelled` is a
        part of it.
        """
        hidden = self.apply(
            params,
            tuple(part.tokens for part in labelled),
            predict=tuple((0, part.target.shape[1]) for part in labelled),
            head=False,
            dropout_key=dropout_key,
        )
        targets = tuple(part.target for part in labelled)
        weights = tuple(
            part.weight / count for part, count in zip(labelled, num_tokens, strict=True)
        )
        with jax.named_scope("head"):
            return weighted_nll(self.head, hidden, params["logits"], targets, weights)

    def _microbatch_grads(self, params, labelled, num_tokens, dropout_key):
        """(gradient, losses) of one micro-batch; trimmed if every row of it allows that."""

        def loss_fn(objective, params, labelled):
            losses = objective.losses(params, labelled, num_tokens, dropout_key)
            return jnp.sum(losses), losses

        rare = dataclasses.replace(self, apply=self.rare_apply or self.apply)
        grad_fn, rare_grad_fn = (
            jax.grad(functools.partial(loss_fn, objective), has_aux=True)
            for objective in (self, rare)
        )
        pairs = list(zip(labelled, self.queries, strict=True))
        fits = [trim.fits(part, queries) for part, queries in pairs if queries]
        if not fits:
            return grad_fn(params, labelled)
        short = tuple(trim.trim(part, queries) if queries else part for part, queries in pairs)
        with jax.named_scope("trimmed"):
            return jax.lax.cond(
                jnp.all(jnp.stack(fits)),
                lambda: grad_fn(params, short),
                lambda: rare_grad_fn(params, labelled),
            )

    def loss_and_grads(self, params, labelled, dropout_key=None):
        """Phase losses [phases] and the gradient of their sum, in `accumulation` micro-batches.

        Rows of each phase are cut into equal runs; only one run's activations are alive at a time;
        its rows are split over the mesh. Gradients are summed in float32.
        """
        num_tokens = [jnp.maximum(jnp.sum(part.num_tokens), 1) for part in labelled]
        if self.accumulation == 1:
            grads, losses = self._microbatch_grads(params, labelled, num_tokens, dropout_key)
            return losses, grads

        def one(carry, micro):
            part, index = micro
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            grads, losses = self._microbatch_grads(params, part, num_tokens, key)
            return jax.tree.map(jnp.add, carry, (losses, grads)), None

        micros = jax.tree.map(
            lambda a: a.reshape(self.accumulation, -1, *a.shape[1:]),
            labelled,
        )
        if self.mesh is not None:
            micros = jax.lax.with_sharding_constraint(micros, sharding.rows(self.mesh, axis=1))
        zeros = (jnp.zeros(len(labelled)), jax.tree.map(jnp.zeros_like, params))
        (losses, grads), _ = jax.lax.scan(one, zeros, (micros, jnp.arange(self.accumulation)))
        return losses, grads


def make_objective(config, built, phases: Sequence[Phase]) -> PhaseLoss:
    """The objective of a training run: `built` is a build.BuiltModel."""
    rows = config.train.batch_size // config.train.grad_accumulation
    length = config.data.seq_len
    padded = config.data.packing == "pad"  # padding comes after the predicted tokens

    def kept(phase: Phase) -> int | None:
        return trim.kept_queries(phase, length, round(phase.fraction * rows), built.mesh)

    queries = tuple(None if padded else kept(phase) for phase in phases)
    accumulation = config.train.grad_accumulation
    rare = None
    if not config.model.unroll and built.model.unroll > 1:  # a scan is quicker to compile
        rare = transformer.bind(dataclasses.replace(built.model, unroll=1), built.mesh)
    return PhaseLoss(built.apply, built.head, queries, accumulation, built.mesh, rare)
