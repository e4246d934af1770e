"""Drops query copies that reach no loss: half or more of the tokens of a sequential phase.

No token of another rank reads a query copy, so a copy without a weight is unused (it equals the
context copy of its clean token). The number of masks is random and shapes are static: each row
keeps a fixed number of its last query copies; a batch in which a row needs more runs untrimmed.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from scipy import stats

from esolm_jax.family.labels import LabelledBatch, Layout
from esolm_jax.family.phase import Phase
from esolm_jax.parallel import sharding

# Flash attention pads queries, keys, values and their gradients to whole blocks of so many tokens,
# at 1584 tokens a row for 5 % of a step's time: as many more tokens are worth it.
BLOCK = {"gpu": 64}
PADDING = 1.04


def kept_queries(phase: Phase, length: int, rows: int, mesh: Mesh | None) -> int | None:
    """The number M of query copies that each of `rows` rows of a phase keeps; None: all tokens.
    A multiple of 8, of the mesh's sequence axis, and on GPUs of a block of attention if that is
    not dear. mesh: None = one device."""
    if not phase.can_trim_queries:
        return None
    parts = mesh.shape["sequence"] if mesh else 1
    counts = length, phase.masked_fraction, rows
    kept = num_queries(*counts, math.lcm(8, parts))
    block = math.lcm(8, parts * BLOCK.get(sharding.platform(mesh), 1))
    if length % block == 0:
        whole = num_queries(*counts, block)
        padded = PADDING * (length + expected_queries(*counts, kept))
        kept = whole if length + expected_queries(*counts, whole) <= padded else kept
    return kept if kept < length else None


@functools.cache
def num_queries(length: int, masked_fraction: float, rows: int, multiple: int = 8) -> int:
    """The number M of query copies that a row keeps: a multiple of `multiple`, or L. It minimizes
    `expected_queries`."""
    bounds = list(range(multiple, length, multiple))
    queries = functools.partial(expected_queries, length, masked_fraction, rows)
    return min([length, *bounds], key=queries)  # if equal, L: no branch at run time


def expected_queries(length: int, masked_fraction: float, rows: int, bound: int) -> float:
    """The expected number of query copies if a row keeps M = `bound`: M or, if any of `rows` rows
    has more than M of Binomial(L, masked_fraction) tokens to predict, L."""
    return bound + (length - bound) * exceeded(length, masked_fraction, rows, bound)


def exceeded(length: int, masked_fraction: float, rows: int, bound: int) -> float:
    """Probability that some row has more than `bound` tokens to predict."""
    one = stats.binom.sf(bound, length, masked_fraction)
    return 1.0 if one == 1 else -math.expm1(rows * math.log1p(-one))


def fits(labelled: LabelledBatch, queries: int):
    """bool scalar: whether trimming to `queries` query copies keeps all predictions."""
    dropped = labelled.weight[:, : labelled.weight.shape[1] - queries]
    return ~jnp.any(dropped != 0)


def trim(labelled: LabelledBatch, queries: int) -> LabelledBatch:
    """The batch with the last `queries` query copies of each row, in front of the whole context."""
    length = labelled.target.shape[1]
    drop = length - queries
    tokens = labelled.tokens
    layout = tokens.layout and Layout(tokens.layout.length, queries, tokens.layout.block)
    tokens = type(tokens)(
        token=tokens.token[:, drop:],
        position=tokens.position[:, drop:],
        rank=tokens.rank[:, drop:],
        in_context=tokens.in_context[:, drop:],
        layout=layout,
    )
    return LabelledBatch(
        tokens=tokens,
        target=labelled.target[:, drop:],
        weight=labelled.weight[:, drop:],
        num_tokens=labelled.num_tokens,
    )


def trimmed_if_fits(run: Callable, labelled: LabelledBatch, queries: int | None):
    """run(labelled): on the trimmed batch, if that keeps all predictions. None: all tokens."""
    if queries is None:
        return run(labelled)
    short = trim(labelled, queries)
    with jax.named_scope("trimmed"):
        return jax.lax.cond(fits(labelled, queries), lambda: run(short), lambda: run(labelled))
