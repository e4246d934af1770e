"""The transformer: against NumPy, against itself computed in other ways, and on meshes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from styles import DIT, GPT2, LENGTH, LLAMA, VOCAB, params_of

from esolm_jax.config import default_config
from esolm_jax.family.labels import LabelledBatch, Layout, Tokens
from esolm_jax.model import layers
from esolm_jax.model import transformer as model
from esolm_jax.model.lm_head import Head
from esolm_jax.model.model_config import REMAT
from esolm_jax.parallel import sharding
from esolm_jax.training.phase_loss import PhaseLoss

GPT2_ALL = dataclasses.replace(GPT2, kv_heads=2, attention_width=32, qk_norm=True)


@functools.cache
def logits_of(config, mesh=None):
    apply = model.bind(config, mesh)
    return jax.jit(lambda params, tokens: apply(params, tokens))


def two_streams(rows=2, length=LENGTH, seed=0, layout=True):
    """Query copies ‖ context, in a random order of positions; ids are random."""
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random((rows, length)), axis=1)
    index = np.tile(np.arange(length), (rows, 1))
    labels = [
        rng.integers(0, VOCAB, (rows, 2 * length)),
        np.concatenate([order, order], axis=1),
        np.concatenate([index, index], axis=1),
    ]
    in_context = np.tile(np.arange(2 * length) >= length, (rows, 1))
    return Tokens(
        *(label.astype(np.int32) for label in labels),
        in_context,
        layout=Layout(length, length) if layout else None,
    )


def causal(rows=2, length=LENGTH, seed=1):
    rng = np.random.default_rng(seed)
    index = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    token = rng.integers(0, VOCAB, (rows, length)).astype(np.int32)
    return Tokens(token, index, index, index >= 0, layout=Layout(length))


def assert_close(found, wanted, tolerance=1e-5):
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


# Against NumPy.


def numpy_llama(params, tokens: Tokens, config) -> np.ndarray:
    """Logits float64 [B, T, V]: token by token, head by head, from the definitions."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    width = config.width // config.heads
    shared = config.heads // config.kv_heads  # heads that share a key
    token, position, rank, in_context = (np.asarray(a) for a in jax.tree.leaves(tokens))

    def rms(h, scale):
        return h / np.sqrt((h**2).mean(axis=-1, keepdims=True) + 1e-5) * scale

    def rotate(x, where):
        """x [K] at a position: pairs (i, i + K/2) turn by position · base^(−2i/K)."""
        out = x.copy()
        for i in range(width // 2):
            angle = where * config.rope_base ** (-2 * i / width)
            a, b = x[i], x[i + width // 2]
            out[i] = a * np.cos(angle) - b * np.sin(angle)
            out[i + width // 2] = a * np.sin(angle) + b * np.cos(angle)
        return out

    def may_read(b, q, k):
        if in_context[b, k]:
            return rank[b, k] + (not in_context[b, q]) <= rank[b, q]
        return not in_context[b, q] and rank[b, k] == rank[b, q]

    rows, length = token.shape
    logits = np.zeros((rows, length, config.vocab_size))
    for b in range(rows):
        h = p["embedding"]["embedding"][token[b]]
        for n in range(config.blocks):
            block = jax.tree.map(lambda a: a[n], p["blocks"])  # noqa: B023
            normed = rms(h, block["attention_norm"]["scale"])
            qkv = np.einsum("td,dgrk->tgrk", normed, block["qkv"]["kernel"])
            out = np.zeros((length, config.heads, width))
            for head in range(config.heads):
                group, r = divmod(head, shared)
                q = [rotate(qkv[t, group, r], position[b, t]) for t in range(length)]
                k = [rotate(qkv[t, group, shared], position[b, t]) for t in range(length)]
                for t in range(length):
                    seen = [s for s in range(length) if may_read(b, t, s)]
                    scores = np.array([q[t] @ k[s] / np.sqrt(width) for s in seen])
                    e = np.exp(scores - scores.max())
                    values = np.array([qkv[s, group, shared + 1] for s in seen])
                    out[t, head] = e / e.sum() @ values
            h = h + out.reshape(length, -1) @ block["attention_out"]["kernel"]
            gate, up = np.moveaxis(
                np.tensordot(rms(h, block["mlp_norm"]["scale"]), block["mlp_in"]["kernel"], 1), 1, 0
            )
            h = h + (gate / (1 + np.exp(-gate)) * up) @ block["mlp_out"]["kernel"]
        logits[b] = rms(h, p["final_norm"]["scale"]) @ p["logits"]["kernel"]
    return logits


def test_llama_is_what_numpy_says():
    tokens, params = two_streams(), params_of(LLAMA)
    found = logits_of(LLAMA)(params, tokens)
    assert found.dtype == jnp.float32
    assert_close(found, numpy_llama(params, tokens, LLAMA))


def test_llama_has_neither_biases_nor_modulation():
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params_of(LLAMA))}
    assert len(names) == 9  # table, head, three norms, qkv, out, in, out
    assert not any("bias" in name or "modulation" in name or "time" in name for name in names)


def test_shared_keys_are_those_of_a_model_that_repeats_them():
    """Head h reads the keys of head h // 2; so do heads with two equal kernels."""
    params = params_of(LLAMA)
    whole = dataclasses.replace(LLAMA, kv_heads=0)
    assert whole.groups == 4 and LLAMA.groups == 2
    kernel = params["blocks"]["qkv"]["kernel"]  # [N, D, 2, 2 queries + key + value, K]
    queries, keys_values = kernel[:, :, :, :2], kernel[:, :, :, 2:]
    queries = queries.reshape(2, 16, 4, 1, 4)
    repeated = np.concatenate([queries, np.repeat(keys_values, 2, axis=2)], axis=3)
    blocks = params["blocks"] | {"qkv": {"kernel": repeated}}
    tokens = two_streams()
    found = logits_of(whole)(params | {"blocks": blocks}, tokens)
    assert_close(found, logits_of(LLAMA)(params, tokens), 2e-6)


# Against itself.


@pytest.mark.parametrize("config", [DIT, LLAMA], ids=["dit", "llama"])
def test_kinds_of_attention_give_the_same_logits(config):
    tokens = two_streams(length=20)
    wanted = logits_of(config)(params_of(config), tokens)
    chunked = dataclasses.replace(config, attention="chunked")
    assert_close(logits_of(chunked)(params_of(config), tokens), wanted)
    bare = tokens.replace(layout=None)
    assert_close(logits_of(chunked)(params_of(config), bare), wanted)


def loss_and_grads(config, batches, mesh=None, dropout_key=None):
    """Of the first half of the tokens, which predict random ones."""
    apply = model.bind(config, mesh)
    objective = PhaseLoss(apply, Head.of(config, 3, mesh, chunk=8), (None,) * len(batches))
    labelled = []
    for tokens in batches:
        rng = np.random.default_rng(7)
        shape = tokens.token.shape[0], tokens.token.shape[1] // 2
        target = rng.integers(4, VOCAB, shape).astype(np.int32)
        weight = ((rng.random(shape) < 0.6) * 1.5).astype(np.float32)
        count = np.full(shape[:1], shape[1], np.int32)
        labelled.append(LabelledBatch(tokens, target, weight, count))
    run = jax.jit(lambda params, parts: objective.loss_and_grads(params, parts, dropout_key))
    return run, tuple(labelled)


@pytest.mark.usefixtures("compiled_fast")
def test_remat_and_unroll_change_neither_loss_nor_gradients():
    """With dropout, which must draw the same twice."""
    base = dataclasses.replace(LLAMA, dropout=0.2, attention="chunked")
    batches, key = (causal(),), jax.random.key(3)
    found = []
    for change in {}, {"remat": "full"}, {"remat": "operands", "unroll": 2}:
        run, labelled = loss_and_grads(dataclasses.replace(base, **change), batches, None, key)
        found.append(run(params_of(LLAMA), labelled))
    assert np.abs(np.asarray(found[0][0])).min() > 0
    for other in found[1:]:
        assert_close(other, found[0], 2e-6)


@pytest.mark.usefixtures("compiled_fast")
def test_unrolled_blocks_cast_their_kernels_once():
    """In bfloat16; the gradients are those of the float32 kernels, as in a scan."""
    base = dataclasses.replace(DIT, dtype="bfloat16", attention="chunked", remat="operands")
    found, casts = [], []
    for unroll in 1, DIT.blocks:
        run, labelled = loss_and_grads(dataclasses.replace(base, unroll=unroll), (causal(),))
        found.append(run(params_of(DIT), labelled))
        stack = "x".join(map(str, params_of(DIT)["blocks"]["mlp_in"]["kernel"].shape))
        text = run.lower(params_of(DIT), labelled).as_text()
        casts.append(len(re.findall(rf"convert .*tensor<{stack}xf32>\) -> .*bf16", text)))
    assert casts == [0, 1]
    scanned, unrolled = found
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(unrolled[1])}
    assert dtypes == {jnp.dtype("float32")}
    assert_close(unrolled, scanned, 3e-2)


@pytest.mark.parametrize("kind", ["chunked", "splash"])
def test_policies_keep_activations_that_have_these_names(kind):
    config = dataclasses.replace(LLAMA, attention=kind, remat="full")
    run, labelled = loss_and_grads(config, (two_streams(length=128),))
    text = str(jax.make_jaxpr(run)(params_of(LLAMA), labelled))
    names = set(re.findall(r"name\[.*?name=(\w+)", text, re.DOTALL))
    assert names == {name for policy in REMAT.values() for name in policy or ()}


def products_again(config):
    """Products in a step of one block, by policy, beyond those without rematerialization; without
    the one row of adaLN, which costs nothing."""
    counts = {}
    for policy in REMAT:
        one = dataclasses.replace(config, attention="chunked", remat=policy, blocks=1)
        run, labelled = loss_and_grads(one, (causal(),))
        text = run.lower(params_of(one), labelled).as_text()
        counts[policy] = len(re.findall(r"stablehlo\.dot_general.*: \(tensor<(?!1x)", text))
    return {policy: count - counts["none"] for policy, count in counts.items()}


def test_the_gradient_of_a_gate_needs_no_product_again():
    again = products_again(DIT)
    assert again["matmuls"] == again["operands"] == 0


def test_what_is_kept_is_not_computed_again():
    """Products with a kernel, and those of attention, in a block's backward pass beyond the two
    that each needs."""
    again = products_again(LLAMA)
    # attention: qk, v; kernels: qkv, out, in (that of mlp_out is not needed)
    assert again == {"none": 0, "operands": 0, "matmuls": 0, "attention": 3, "full": 5}


def test_two_batches_at_once_are_each_alone():
    """Of other sizes, and each predicting its own part."""
    apply, params = model.bind(DIT), params_of(DIT)
    batches = two_streams(rows=3), causal(rows=2, length=5)
    parts = (0, 8), (1, 3)
    both = jax.jit(lambda params: apply(params, batches, predict=parts))(params)
    for found, tokens, (offset, count) in zip(both, batches, parts, strict=True):
        wanted = logits_of(DIT)(params, tokens)[:, offset : offset + count]
        assert_close(found, wanted, 2e-6)


def test_hidden_states_are_what_the_head_projects():
    apply, tokens, params = model.bind(DIT), causal(), params_of(DIT)
    hidden = jax.jit(lambda: apply(params, tokens, head=False))()
    assert hidden.shape == (2, LENGTH, 16)
    logits = np.asarray(hidden, np.float64) @ params["logits"]["kernel"] + params["logits"]["bias"]
    assert_close(logits_of(DIT)(params, tokens), logits, 2e-6)


# Dtypes.


@pytest.mark.parametrize("config", [DIT, LLAMA], ids=["dit", "llama"])
def test_bfloat16_is_for_computing_and_logits_are_float32(config):
    low = dataclasses.replace(config, dtype="bfloat16")
    apply, tokens, params = model.bind(low), causal(), params_of(config)
    logits = logits_of(low)(params, tokens)
    assert logits.dtype == jnp.float32
    wanted = np.asarray(logits_of(config)(params, tokens))
    error = np.abs(np.asarray(logits) - wanted).max() / np.abs(wanted).max()
    assert 1e-4 < error < 0.05
    text = str(jax.make_jaxpr(lambda: apply(params, tokens, head=False))())
    assert "f64" not in text
    hidden = jax.eval_shape(lambda: apply(params, tokens, head=False))
    assert hidden.dtype == jnp.bfloat16
    # What blocks hand on to each other, the carry of the scan over them.
    (scan,) = [
        e
        for e in jax.make_jaxpr(lambda: apply(params, tokens))().eqns
        if e.primitive.name == "scan"
    ]
    assert scan.outvars[0].aval.dtype == jnp.bfloat16
    assert scan.outvars[0].aval.shape == (2, LENGTH, 16)


# On meshes.


@pytest.mark.parametrize(
    ("axes", "config"),
    [
        (dict(fsdp=2, tensor=2, sequence=2), LLAMA),
        (dict(data=2, fsdp=2, tensor=2), DIT),
        (dict(fsdp=2, tensor=2, sequence=2), GPT2_ALL),
    ],
    ids=["llama", "dit", "gpt2 with norms of queries"],
)
def test_a_mesh_computes_the_loss_and_gradients_of_one_device(axes, config):
    settings = default_config().mesh
    settings.update({"data": 1} | axes)
    mesh = sharding.make_mesh(settings)
    config = dataclasses.replace(config, attention="chunked", remat="matmuls")
    batches = (two_streams(rows=8, length=16, seed=5),)
    if config.style == "llama":  # two at once are no matter of style
        batches = two_streams(rows=4), *batches
    params = params_of(config)
    run, labelled = loss_and_grads(config, batches)
    wanted = run(params, labelled)
    run, _ = loss_and_grads(config, batches, mesh)
    where = sharding.parameters(mesh, params)
    losses, grads = run(jax.device_put(params, where), labelled)
    assert_close((losses, grads), wanted, 5e-6)


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_a_norm_in_one_pass_is_that_in_two(mean):
    """Values and gradients, for means as far from 0 as thirty deviations."""
    config = dataclasses.replace(DIT, dtype="bfloat16")
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.normal(size=(4, 96)) + mean, jnp.bfloat16)
    grad = jnp.asarray(rng.normal(size=(4, 96)), jnp.float32)
    results = []
    for normalize in layers.normalize, layers.normalize_in_one_pass:
        y, pull = jax.vjp(lambda h: normalize(config, h), h.astype(jnp.float32))  # noqa: B023
        results.append((y, *pull(grad)))
    for two, one in zip(*results, strict=True):
        assert np.abs(one - two).max() < 1e-3 * np.abs(two).max()  # 16 bits: 4e-3
