"""Products with few queries or rows: loops on a CPU, matrix products on other platforms.

On CPUs, XLA copies the slice of the cache that it passes to a matrix product, and many small
products are slow; its loops read the cache in place. XLA also runs products with large kernels on
one thread, or starts the second one too late; its loops are shared among threads.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from esolm_jax.parallel import sharding
from esolm_jax.sampling.engine.quantize import Quantized, split

# Loops are faster up to these sizes; above them, matrix products.
FEW_QUERIES = 32  # of a group of heads
FEW_ROWS, LARGE = 8, 2**16  # rows; entries of the kernel (at least)
FEWER_ROWS, TERMS = 2, 2**21  # rows of more terms: their sums do not fit in the cache
FOLD = 16  # addresses that a loop reads at once
PAGE = 4096  # bytes; a CPU's L1 cache holds half of FOLD addresses that are a multiple apart
KEY_SLOTS = 8  # interleaved
SPLIT = 2  # parts of a kernel that threads read, each for all rows


def key_slots(mesh: Mesh | None) -> int:
    """I: the number of slots whose keys are interleaved. A CPU's loop then reads contiguous memory;
    in [K, S] it would read K distant addresses at once. 1 on other platforms: matrix products need
    whole keys."""
    return KEY_SLOTS if sharding.platform(mesh) == "cpu" else 1


def attention_scores(q_BGTK, keys_BGJKI, parts: int):
    """Scores of T queries and the first I · parts keys: float32 [B, G, T, parts, I]."""
    return _of_queries(_multiply_add, _scores, q_BGTK, keys_BGJKI, parts)


def weighted_values(p_BGTS, values_BGSK, n: int):
    """The sum of the first n values, weighted by p [B, G, T, n]: float32 [B, G, T, K]."""
    return _of_queries(_weighted_sum, _weighted, p_BGTS, values_BGSK, n)


def _of_queries(loops, whole, a, b, n: int):
    loops, whole = (functools.partial(f, n=n) for f in (loops, whole))
    if a.shape[2] > FEW_QUERIES:
        return whole(a, b)
    return jax.lax.platform_dependent(a, b, cpu=loops, default=whole)


def _scores(q, keys_BGJKI, n: int):
    batch, groups, _, width, together = keys_BGJKI.shape
    keys = keys_BGJKI[:, :, :n].swapaxes(2, 3).reshape(batch, groups, width, n * together)
    keys = keys.astype(q.dtype)
    score = jnp.matmul(q, keys, preferred_element_type=jnp.float32)
    return score.reshape(*score.shape[:3], n, together)


def _weighted(p, values, n: int):
    values = values[:, :, :n].astype(p.dtype)
    return jnp.matmul(p, values, preferred_element_type=jnp.float32)


def _multiply_add(q, keys_BGJKI, n: int):
    """_scores on a CPU: one loop that adds K products."""
    q = q.astype(jnp.float32)

    def product(i):
        return q[..., i, None, None] * keys_BGJKI[:, :, None, :n, i].astype(jnp.float32)

    return functools.reduce(jnp.add, [product(i) for i in range(q.shape[3])])


def _weighted_sum(p, values_BGSK, n: int):
    """_weighted on a CPU: one loop adds strided parts of the n terms, and a product with ones adds
    the rest. XLA would fuse two sums into one loop that reads too many addresses at once."""
    values, p = values_BGSK[:, :, None].astype(jnp.float32), p[..., None].astype(jnp.float32)
    places = _places(n // math.gcd(FOLD, n) * values_BGSK.shape[3] * values_BGSK.dtype.itemsize)
    step = n // math.gcd(places, n) if n > places else 1
    parts = [slice(at, at + step) for at in range(0, n, step)]
    out = functools.reduce(jnp.add, [p[:, :, :, at] * values[:, :, :, at] for at in parts])
    if step > 1:
        out = jnp.matmul(jnp.ones((*out.shape[:3], 1, step)), out)
    return out[:, :, :, 0]


def matmul(h_BWD, kernel: jax.Array | Quantized, dtype=None):
    """The product of h and the kernel over D: [B, W, …] in `dtype` (default: that of h)."""
    dtype = h_BWD.dtype if dtype is None else dtype
    codes, scale = split(kernel)
    if scale is None:
        return _product(h_BWD, codes, dtype)
    return (_product(h_BWD, codes, jnp.float32) * scale[None, None]).astype(dtype)


def _product(h_BWD, kernel, dtype):
    """`matmul` with an array."""

    def whole(h, kernel):
        return jnp.tensordot(h, kernel.astype(h.dtype), 1, preferred_element_type=dtype)

    rows = math.prod(h_BWD.shape[:2])
    few = rows <= (FEW_ROWS if rows * kernel.size <= TERMS else FEWER_ROWS)
    if not few or len(kernel) % FOLD or kernel.size < LARGE:
        return whole(h_BWD, kernel)
    loops = functools.partial(_rows_times, dtype=dtype)
    return jax.lax.platform_dependent(h_BWD, kernel, cpu=loops, default=whole)


def _rows_times(h_BWD, kernel, dtype):
    """_product on a CPU: one loop for all rows adds parts of the D terms; a product with ones adds
    the rest. Threads divide the first axis of a loop, so the rows are not the first axis: each
    thread would read the whole kernel."""
    rows, width = math.prod(h_BWD.shape[:2]), kernel.size // len(kernel)
    places = _places(width * kernel.dtype.itemsize)
    split = math.gcd(SPLIT, len(kernel) // places) if rows > 1 else 1
    parts = kernel.reshape(split, -1, places, width).astype(jnp.float32)
    h = h_BWD.reshape(rows, *parts.shape[:3]).swapaxes(0, 1).astype(jnp.float32)
    terms = [h[:, :, :, i, None] * parts[:, None, :, i] for i in range(places)]
    out = functools.reduce(jnp.add, terms)
    out = jnp.matmul(jnp.ones((split, rows, 1, parts.shape[1])), out)
    y = functools.reduce(jnp.add, list(out))
    return y.reshape(*h_BWD.shape[:2], *kernel.shape[1:]).astype(dtype)


def _places(stride: int) -> int:
    """The number of addresses, `stride` bytes apart, that a loop reads at once."""
    return FOLD if stride % PAGE else FOLD // 2
