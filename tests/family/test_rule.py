"""What each family's tokens may read, against masks written in plain loops from the definitions,
and against what the logits of a model with random weights really depend on."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import toy

from esolm_jax.family import ar as ar_family
from esolm_jax.family import bd3 as bd3_family
from esolm_jax.family import eso_a, eso_b
from esolm_jax.family import mdlm as mdlm_family
from esolm_jax.family.labels import Tokens
from esolm_jax.family.rule import comparisons, dense_mask, visible

LENGTH = 9
BLOCK = 3
REAL_TOKENS = (9, 9, 7, 5, 1)  # per row; the rest of the row is padding


def draw(seed: int, natural_clean: bool, shuffle_masked: bool):
    """x, valid, masked [B, L] and an order [B, L]: clean, then masked, then padding."""
    rng = np.random.default_rng(seed)
    batch = len(REAL_TOKENS)
    x = rng.choice(toy.REAL, (batch, LENGTH)).astype(np.int32)
    valid = np.arange(LENGTH) < np.array(REAL_TOKENS)[:, None]
    masked = (rng.random((batch, LENGTH)) < rng.random((batch, 1))) & valid
    masked[1, 0] = True  # never without any
    orders = []
    for row in range(batch):
        clean = [p for p in range(LENGTH) if valid[row, p] and not masked[row, p]]
        late = [p for p in range(LENGTH) if masked[row, p]]
        if not natural_clean:
            rng.shuffle(clean)
        if shuffle_masked:
            rng.shuffle(late)
        orders.append(clean + late + list(range(REAL_TOKENS[row], LENGTH)))
    return x, valid, masked, np.array(orders, np.int32)


# In each family's function, q and k are places in the pass: index i < L is token i of the first
# stream (z where there are two), L + i is token i of x. `clean` is how many clean tokens there are,
# `real` how many real ones. In ar, mdlm and bd3 the tokens lie in text order.


def ar(q, k, clean, real):
    """A token reads itself and all before it."""
    return k <= q


def mdlm(q, k, clean, real):
    """Everything real is read by everything."""
    return k < real


def bd3(q, k, clean, real):
    """z reads z of its own block and x of the blocks before; x reads x of its own block and of the
    blocks before; nobody reads padding."""
    q_is_x, q = divmod(q, LENGTH)
    k_is_x, k = divmod(k, LENGTH)
    if k >= real:
        return False
    if q_is_x:
        return bool(k_is_x) and k // BLOCK <= q // BLOCK
    if k_is_x:
        return k // BLOCK < q // BLOCK
    return k // BLOCK == q // BLOCK


def eso_b_diffusion(q, k, clean, real):
    """A token reads itself and all before it in the order."""
    return k <= q


def eso_b_sequential(q, k, clean, real):
    """z reads itself and x of earlier index; x reads x of its own index and of earlier ones."""
    q_is_x, q = divmod(q, LENGTH)
    k_is_x, k = divmod(k, LENGTH)
    if q_is_x:
        return bool(k_is_x) and k <= q
    return k < q if k_is_x else k == q


def eso_a_diffusion(q, k, clean, real):
    """Clean tokens read all clean tokens; a mask reads these, itself and the masks before it."""
    return k < clean if q < clean else k <= q


def eso_a_sequential(q, k, clean, real):
    """A mask of z reads itself, all clean x and the x of earlier index; clean x read all clean x;
    other x read all clean x and the x up to themselves."""
    q_is_x, q = divmod(q, LENGTH)
    k_is_x, k = divmod(k, LENGTH)
    if q_is_x and q < clean:
        return bool(k_is_x) and k < clean
    if q_is_x:
        return bool(k_is_x) and k <= q
    return k < q if k_is_x else k == q


def label(family, seed):
    """A labelled batch with masked [B, L] and how many clean tokens each row has."""
    x, valid, masked, order = draw(
        seed, natural_clean="eso_a_seq" in family, shuffle_masked="diffusion" in family
    )
    mask = toy.MASK
    match family:
        case "ar":
            labelled = ar_family.label(x, valid, start=toy.START)
        case "mdlm":
            labelled = mdlm_family.label(x, valid, masked, masked, mask=mask)
        case "bd3":
            labelled = bd3_family.label(x, valid, masked, masked, mask=mask, block_length=BLOCK)
        case _:
            name, phase = family.rsplit("_", 1)
            to_label = getattr({"eso_a": eso_a, "eso_b": eso_b}[name], f"label_{phase}")
            labelled = to_label(x, valid, masked, order, masked, mask=mask)
    return labelled, np.sum(valid & ~masked, axis=1)


CAN_READ = {
    rule.__name__: rule
    for rule in (
        ar, mdlm, bd3, eso_a_diffusion, eso_a_sequential, eso_b_diffusion, eso_b_sequential
    )
}  # fmt: skip


def compared(family, q, row, clean):
    """Real tokens that can reach a loss. In (A), sequential, a clean token of z reaches none, being
    read by nobody and predicting nothing."""
    index = q % LENGTH
    if index >= REAL_TOKENS[row]:
        return False
    return not (family == "eso_a_sequential" and q < LENGTH and index < clean)


@pytest.mark.parametrize("family", CAN_READ)
def test_mask_of_every_family_is_its_definition(family):
    rows_compared = 0
    for seed in range(6):
        labelled, clean = label(family, seed)
        mask = np.asarray(dense_mask(labelled.tokens, labelled.tokens))
        assert mask.shape == (len(REAL_TOKENS), *[labelled.tokens.token.shape[1]] * 2)
        for row, real in enumerate(REAL_TOKENS):
            for q in range(mask.shape[1]):
                if compared(family, q, row, clean[row]):
                    want = [CAN_READ[family](q, k, clean[row], real) for k in range(mask.shape[2])]
                    assert mask[row, q].tolist() == want, (seed, row, q)
                    assert not any(want[k] for k in range(mask.shape[2]) if k % LENGTH >= real)
                    rows_compared += 1
    assert rows_compared >= 6 * LENGTH


def closure(can_read):
    """Whom a token can depend on through any number of layers."""
    count = len(can_read)
    reach = [list(row) for row in can_read]
    for via in range(count):
        for q in range(count):
            for k in range(count):
                reach[q][k] = reach[q][k] or (reach[q][via] and reach[via][k])
    return reach


@pytest.mark.parametrize("family", CAN_READ)
def test_logits_depend_on_what_is_visible_and_on_nothing_else(family):
    labelled, clean = label(family, 0)
    tokens = labelled.tokens
    total = tokens.token.shape[1]
    base = np.asarray(toy.logits_of(tokens))
    changed = np.zeros((len(REAL_TOKENS), total, total), bool)  # row, query, changed token
    for k in range(total):
        other = tokens.token.at[:, k].set((tokens.token[:, k] + 2) % toy.CONFIG.vocab_size)
        logits = np.asarray(toy.logits_of(tokens.replace(token=other)))
        changed[:, :, k] = (logits != base).any(axis=-1)
    queries = np.argwhere(np.asarray(labelled.weight) > 0)
    assert len(queries) > LENGTH
    for row, real in enumerate(REAL_TOKENS):
        can_read = functools.partial(CAN_READ[family], clean=clean[row], real=real)
        direct = [[can_read(q, k) for k in range(total)] for q in range(total)]
        reach = closure(direct)
        for q in queries[queries[:, 0] == row, 1]:
            for k in range(total):
                if not reach[q][k]:
                    assert not changed[row, q, k], f"row {row}: token {k} leaks into {q}"
                elif direct[q][k]:
                    assert changed[row, q, k], f"row {row}: token {k} does not reach {q}"


def test_a_token_reads_itself_whatever_its_labels():
    rank = jnp.arange(3)[None]
    for in_context in (True, False):
        q = Tokens(rank, rank, rank, jnp.full(rank.shape, in_context))
        assert np.diagonal(np.asarray(dense_mask(q, q))[0]).all()


def test_comparisons_are_the_rule():
    """Of all ranks but the two least integers, also negative ones and, for keys, the largest."""
    largest = np.iinfo(np.int32).max
    ranks = np.array([2 - 2**31, -2, -1, 0, 1, 7, largest - 1, largest])
    labels = [(r, c) for r in ranks for c in (True, False)]
    q_rank, q_in_context = (np.array(a)[:, None] for a in zip(*labels[:-2], strict=True))
    k_rank, k_in_context = (np.array(a)[None] for a in zip(*labels, strict=True))
    q_rank, k_rank = q_rank.astype(np.int32), k_rank.astype(np.int32)
    reads, q_copy, context, k_copy = comparisons(q_rank, q_in_context, k_rank, k_in_context)
    wanted = visible(q_rank, q_in_context, k_rank, k_in_context)
    np.testing.assert_array_equal((context <= reads) | (k_copy == q_copy), wanted)
    assert 0 < np.asarray(wanted).mean() < 1
