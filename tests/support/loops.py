"""The decoding loops as functions of (network, plan, sampler, row keys)."""

from esolm_jax.sampling.loops.confidence import Confidence
from esolm_jax.sampling.loops.loop import Decoded, Task
from esolm_jax.sampling.loops.plain import Plain
from esolm_jax.sampling.loops.speculative import Speculative


def decode(network, plan, sampler, keys, *, mesh=None, eos_id=None, with_logits=False) -> Decoded:
    return Plain(Task(plan, sampler, keys, mesh, eos_id), with_logits).run(network)


def speculate(
    network, plan, sampler, keys, *, k, adaptive=False, style="chain", mesh=None, eos_id=None
) -> tuple[Decoded, dict]:
    """(texts, figures of the drafts)."""
    task = Task(plan, sampler, keys, mesh, eos_id)
    decoded = Speculative(task, k, adaptive, style).run(network)
    return decoded, decoded.drafts


def by_confidence(network, plan, sampler, keys, *, cached, mesh=None, **settings) -> Decoded:
    return Confidence(Task(plan, sampler, keys, mesh), cached, **settings).run(network)
