"""A toy model with random weights, whose texts of length 4 can all be listed, and what one step of
each family reads, written from the definitions (no labelling, mask or cache of the library)."""

import dataclasses
import functools
import itertools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from esolm_jax.config import default_config
from esolm_jax.family.labels import Tokens
from esolm_jax.family.phase import SpecialIds
from esolm_jax.model import transformer as model
from esolm_jax.model.build import BuiltModel
from esolm_jax.model.lm_head import Head
from esolm_jax.model.model_config import ModelConfig
from esolm_jax.parallel import sharding

MASK = 1  # not the last id
START = 0
REAL = (0, 2, 3)
SPECIAL = SpecialIds(mask=MASK, start=START)
CONFIG = ModelConfig(vocab_size=4, width=16, blocks=2, heads=2, cond_width=8)
LENGTH = 4
TEXTS = np.array(list(itertools.product(REAL, repeat=LENGTH)), np.int32)  # all 81
UNREAD = 1000  # rank of filler, from here on
BLOCK = 2


def _random_params():
    """Every parameter is random, so that no zero-initialised part hides a mistake; scaled such that
    what is predicted depends on the other tokens, and no text is all too rare."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        noise = jax.random.normal(jax.random.key(zlib.crc32(name.encode())), leaf.shape)
        if "qkv" in name:  # drawn as [N, D, 3, H, K]: with these numbers the order matters
            blocks, width, heads, three, head_width = leaf.shape
            noise = noise.reshape(blocks, width, three, heads, head_width).swapaxes(2, 3)
        if "embedding" in name or "norm" in name:
            return noise
        return noise * (0.05 if "logits" in name else 0.2 if "qkv" in name else 0.4)

    return jax.tree.map_with_path(draw, model.init(CONFIG, jax.random.key(0)))


PARAMS = _random_params()
apply = model.bind(CONFIG)
BUILT = BuiltModel(
    mesh=sharding.mesh_of(jax.devices()[0]),
    model=CONFIG,
    apply=apply,
    head=Head.of(CONFIG, MASK, chunk=16),
    special=SPECIAL,
)


def lookup_model(length: int) -> tuple[BuiltModel, dict]:
    """A model without blocks, and its weights: the logits of a slot depend on its position and
    token alone. It compiles in no time."""
    rng = np.random.default_rng(0)
    tables = {"position": (length, CONFIG.width), "token": (CONFIG.vocab_size, CONFIG.width)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in tables.items()}

    def lookup(params, tokens: Tokens, *, predict, head):
        assert not head
        of_position, of_token = (
            jnp.asarray(params[name])[getattr(tokens, name)[:, slice(*predict)]] for name in tables
        )
        return of_position + of_token

    built = dataclasses.replace(BUILT, apply=lookup)
    return built, params | {"logits": PARAMS["logits"]}


def built_on(mesh: Mesh) -> BuiltModel:
    """BUILT on another mesh."""
    return dataclasses.replace(
        BUILT, mesh=mesh, apply=model.bind(CONFIG, mesh), head=Head.of(CONFIG, MASK, mesh, chunk=16)
    )


logits_of = jax.jit(lambda tokens: apply(PARAMS, tokens))


def config(objective: str, alpha_0: float, length: int = LENGTH, block_length: int = BLOCK):
    changed = default_config()
    changed.objective, changed.alpha_0 = objective, alpha_0
    changed.data.seq_len, changed.block_length = length, block_length
    return changed


def orders_given(n: int, length: int = LENGTH) -> list[tuple[int, ...]]:
    """All equally likely orders with n diffusion tokens: any n positions, then the rest sorted."""
    return [
        first + tuple(p for p in range(length) if p not in first)
        for first in itertools.permutations(range(length), n)
    ]


def probability_of(n: int, alpha_0: float, length: int = LENGTH) -> float:
    """Binomial(length, α₀) at n."""
    return math.comb(length, n) * alpha_0**n * (1 - alpha_0) ** (length - n)


def step(objective, text, order, first, size, num_diffusion=0, block=BLOCK):
    """(token, position, rank) of all tokens that a step has, those it predicts with coming last.

    The step knows the text at order[:first] and generates order[first : first + size].
    """
    known, masks, later = order[:first], order[first : first + size], order[first + size :]
    match objective:
        case "ar":  # the text so far behind the start token; the last one predicts
            return [(START, 0, 0)] + [(text[i], i + 1, i + 1) for i in range(first)]
        case "mdlm":  # the whole canvas, all of one rank
            return (
                [(text[p], p, 0) for p in known]
                + [(MASK, p, 0) for p in later]
                + [(MASK, p, 0) for p in masks]
            )
        case "bd3":  # the blocks before, and this block with its masks
            this = masks[0] // block
            return (
                [(text[p], p, p // block) for p in known]
                + [(MASK, p, this) for p in later if p // block == this]
                + [(MASK, p, this) for p in masks]
            )
        case "eso_b":  # each reads what comes before it in the order
            return [(text[p], p, r) for r, p in enumerate(known)] + [
                (MASK, p, first + i) for i, p in enumerate(masks)
            ]
        case "eso_a":  # likewise, but the diffusion tokens that are known all read each other
            return [(text[p], p, 0 if r < num_diffusion else r) for r, p in enumerate(known)] + [
                (MASK, p, first + i) for i, p in enumerate(masks)
            ]


def logits_at_end(rows, width: int = LENGTH) -> np.ndarray:
    """Uncached logits [B, width, V] of rows of (token, position, rank), all in context. Rows are
    filled up to `width` in front, with query copies that nobody reads, and the batch up to a power
    of 4, so that few shapes are compiled."""
    filler = [(0, 0, UNREAD + i) for i in range(width)]
    table = [filler[len(row) :] + list(row) for row in rows]
    table += [filler] * (4 ** math.ceil(math.log(len(rows), 4) - 1e-9) - len(rows))
    token, position, rank = np.moveaxis(np.array(table, np.int32), -1, 0)
    return np.asarray(logits_of(Tokens(token, position, rank, rank < UNREAD)))[: len(rows)]


def log_probs(logits) -> np.ndarray:
    """float64, the mask token excluded."""
    logits = np.array(logits, np.float64)
    logits[..., MASK] = -np.inf
    return np.asarray(logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True)))


def text_log_p(objective, texts, orders, num_diffusion=0, given=0) -> np.ndarray:
    """float64 [orders, texts]: log p_σ(x), summed up one step of one token after the other; of what
    follows the first `given` ranks, given these."""
    length = len(texts[0])
    cases = list(itertools.product(orders, texts, range(given, length)))
    rows = [step(objective, text, order, r, 1, num_diffusion) for order, text, r in cases]
    log_p = log_probs(logits_at_end(rows)[:, -1])
    target = [text[order[r]] for order, text, r in cases]
    log_p = log_p[np.arange(len(cases)), target]
    return log_p.reshape(len(orders), len(texts), length - given).sum(axis=-1)


@functools.cache
def exact_log_p(alpha_0: float) -> np.ndarray:
    """float64 [texts]: of TEXTS, when eso_b generates one token per step."""
    shares = [(probability_of(n, alpha_0), orders_given(n)) for n in range(LENGTH + 1)]
    p = [s * np.exp(text_log_p("eso_b", TEXTS, o)).mean(axis=0) for s, o in shares if s]
    return np.log(np.sum(p, axis=0))


def p_of_texts(texts, log_p, among=TEXTS) -> float:
    """p-value of sampled texts [B, 4], log_p [orders, texts] of equally likely orders."""
    texts = np.asarray(texts)
    assert np.isin(texts, REAL).all()  # never the mask
    base = CONFIG.vocab_size ** np.arange(LENGTH)
    place = {code: i for i, code in enumerate((among @ base).tolist())}
    codes, times = np.unique(texts @ base, return_counts=True)
    counts = np.zeros(len(among), int)
    counts[[place[code] for code in codes.tolist()]] = times
    probabilities = np.exp(log_p).mean(axis=0)
    assert abs(probabilities.sum() - 1) < 1e-6
    return p_value(counts, probabilities)


def p_value(counts, probabilities) -> float:
    """Of the chi-square test; cells that expect less than 10 are taken as one."""
    expected = counts.sum() * probabilities
    rare = expected < 10
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    seen = expected > 0
    chi2 = np.sum((counts[seen] - expected[seen]) ** 2 / expected[seen])
    assert counts[~seen].sum() == 0
    return float(jax.scipy.special.gammaincc((seen.sum() - 1) / 2, chi2 / 2))
