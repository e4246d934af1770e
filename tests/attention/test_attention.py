"""Every kind of attention against a plain softmax over the rule's mask; its memory; its meshes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import compiling
from jax.sharding import AbstractMesh, Mesh

from esolm_jax.attention import flash, flash_kernels, recompute
from esolm_jax.attention.attend import KINDS, attend, resolve
from esolm_jax.attention.flash import _visible_blocks
from esolm_jax.attention.splash import _kernel
from esolm_jax.errors import UserError
from esolm_jax.family import rule
from esolm_jax.family.labels import Layout, Tokens
from esolm_jax.parallel import sharding

# A new kernel goes into all three lists; into ALL alone, with tests of its own, if it is for some
# layouts only.
SKIPPING = ["chunked", "flash_interpret", "splash_interpret"]  # of what is invisible
ALL = ["dense", *SKIPPING, "cudnn_interpret"]
ANY_LABELS = ["chunked", "flash_interpret", "splash"]  # splash: falls back to chunked
dense_mask = jax.jit(rule.dense_mask)
LAYOUTS = {  # of 144 tokens each: what JAX runs while it traces is compiled once for all
    "causal": Layout(144),  # AR, diffusion phase of (B)
    "mdlm": Layout(144, block=144),
    "bd3": Layout(72, queries=72, block=8),
    "eso_b_sequential": Layout(72, queries=72),
    "last_queries": Layout(96, queries=48),
}


def of_layout(layout: Layout, padding=(0, 7)) -> Tokens:
    """A row per entry of `padding`: so many tokens at the end of the text are padding, in both
    streams."""
    index = np.arange(layout.queries + layout.length)
    rank, in_context = (np.asarray(label) for label in layout.labels(index))
    text = np.where(in_context, index - layout.queries, index + layout.length - layout.queries)
    pad = text[None] >= layout.length - np.array(padding)[:, None]
    rank = np.where(pad, layout.length, rank[None]).astype(np.int32)
    return Tokens(rank, rank, rank, np.broadcast_to(in_context, rank.shape), layout=layout)


def eso_a(length: int, two_streams: bool) -> Tokens:
    """Labels of (A): clean tokens of x (of the only stream) have rank 0; a cutoff in every row."""
    clean = np.array([[length // 3], [length - 5]])
    index = np.broadcast_to(np.arange(length, dtype=np.int32), (2, length))
    rank = np.where(index < clean, 0, index).astype(np.int32)
    x = Tokens(index, index, rank, index >= 0)
    return Tokens(index, index, index, index < 0).concat(x) if two_streams else x


def draw(tokens: Tokens, heads=2, groups=2, width=16, dtype=jnp.float32):
    """q, k, v and the gradient of the result (0 for padding)."""
    rows, length = tokens.rank.shape
    rng = np.random.default_rng(0)
    q, k, v, grad = (
        rng.normal(size=(rows, count, length, width)) for count in (heads, groups, groups, heads)
    )
    if tokens.layout:
        real = tokens.rank == np.asarray(tokens.layout.labels(np.arange(length))[0])[None]
        grad *= real[:, None, :, None]
    return tuple(a.astype(dtype) for a in (q, k, v, grad))


def plain(q, k, v, grad, mask_BTS):
    """What attention and its gradients are, in float64: (out, dq, dk, dv)."""
    q, k, v, grad = (np.asarray(a, np.float64) for a in (q, k, v, grad))
    rows, heads, length, width = q.shape
    groups = k.shape[1]
    q, grad = (a.reshape(rows, groups, heads // groups, length, width) for a in (q, grad))
    scores = np.einsum("bgrtk,bgsk->bgrts", q, k) / width**0.5
    scores = np.where(np.asarray(mask_BTS)[:, None, None], scores, -np.inf)
    probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    out = np.einsum("bgrts,bgsk->bgrtk", probs, v)
    dprobs = np.einsum("bgrtk,bgsk->bgrts", grad, v)
    dscores = probs * (dprobs - (probs * dprobs).sum(axis=-1, keepdims=True)) / width**0.5
    dq = np.einsum("bgrts,bgsk->bgrtk", dscores, k)
    dk = np.einsum("bgrts,bgrtk->bgsk", dscores, q)
    dv = np.einsum("bgrts,bgrtk->bgsk", probs, grad)
    return *(a.reshape(rows, heads, length, width) for a in (out, dq)), dk, dv


def value_and_gradients(attention, q, k, v, grad):
    """float32 (out, dq, dk, dv)."""

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(attention, q, k, v)
        return out, *pull(grad.astype(out.dtype))

    return [np.asarray(a, np.float32) for a in run(q, k, v)]


def compiled_for(kind: str):
    """Interpreted kernels, which are not what users run, are compiled fast."""
    return compiling(fast=kind.endswith("_interpret"))


def assert_is_plain(tokens, kind, *, tolerance=2e-5, mesh=None, **sizes):
    q, k, v, grad = draw(tokens, **sizes)
    attention = functools.partial(attend, queries=tokens, keys=tokens, kind=kind, mesh=mesh)
    with compiled_for(kind):
        got = value_and_gradients(attention, q, k, v, grad)
    want = plain(q, k, v, grad, dense_mask(tokens, tokens))
    counts = np.asarray(grad, np.float32) != 0  # not padding
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        a, b = (a * counts, b * counts) if name == "out" else (a, b)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ALL)
def test_every_layout_with_shared_key_heads(kind, name):
    assert_is_plain(of_layout(LAYOUTS[name]), kind, heads=4, groups=2)


@pytest.mark.parametrize("two_streams", [False, True])
@pytest.mark.parametrize("kind", ANY_LABELS)
def test_labels_without_a_layout(kind, two_streams):
    assert_is_plain(eso_a(72, two_streams), kind)


@pytest.mark.parametrize(
    "tokens",
    [
        of_layout(Layout(400, queries=320, block=8)),
        eso_a(300, two_streams=True),
    ],
    ids=["bd3", "eso_a"],
)
def test_long_sequences(tokens):
    assert_is_plain(tokens, "chunked", heads=2, groups=1, width=8)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((kind, "last_queries") for kind in ALL if kind != "cudnn_interpret"),
        ("cudnn_interpret", "causal"),
        ("cudnn_interpret", "mdlm"),
    ],
)
def test_bfloat16(kind, name):
    tokens = of_layout(LAYOUTS[name])
    assert_is_plain(tokens, kind, dtype=jnp.bfloat16, tolerance=4e-2)
    q, k, v, _ = draw(tokens, dtype=jnp.bfloat16)
    run = functools.partial(attend, queries=tokens, keys=tokens, kind=kind)
    assert jax.eval_shape(run, q, k, v).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ALL)
def test_what_is_invisible_does_not_reach_the_last_bit(kind):
    layout = Layout(144) if kind == "cudnn_interpret" else Layout(84, queries=60)
    tokens = of_layout(layout, padding=(0,))
    q, k, v, grad = draw(tokens)
    mask = np.asarray(dense_mask(tokens, tokens)[0])

    @jax.jit
    def run(k, v, grad):
        attention = functools.partial(attend, queries=tokens, keys=tokens, kind=kind)
        out, pull = jax.vjp(attention, q, k, v)
        return out, pull(grad)

    with compiled_for(kind):
        compiled = run.lower(k, v, grad).compile()
    before = np.asarray(compiled(k, v, grad)[0])
    for changed in 20, 100:  # a query copy, if there are any; a token in context
        sees = mask[:, changed]
        unseen = np.where(sees[:, None], np.float32(0), grad)
        k_other, v_other = k.copy(), v.copy()
        k_other[:, :, changed] *= 1e3
        v_other[:, :, changed] = -1e6
        after, (_, dk, dv) = jax.tree.map(np.asarray, compiled(k_other, v_other, unseen))
        assert ((before != after).any(axis=(0, 1, 3)) == sees).all()
        assert not dk[:, :, changed].any() and not dv[:, :, changed].any()


def test_chunked_skips_exactly_what_is_invisible_in_a_long_loop():
    tokens = of_layout(Layout(900), padding=(0,))
    q, k, v, _ = draw(tokens, width=8)
    run = jax.jit(functools.partial(attend, queries=tokens, keys=tokens, kind="chunked"))
    other = v.copy()
    other[:, :, 700] = 1e6
    before, after = (np.asarray(run(q, k, values)) for values in (v, other))
    assert (before[:, :, :700] == after[:, :, :700]).all()
    assert (before[:, :, 700:] != after[:, :, 700:]).any(axis=-1).all()


def mesh_of(*shape):
    return Mesh(np.array(jax.devices()).reshape(shape), sharding.AXES)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *((kind, Layout(60, queries=30)) for kind in SKIPPING),
        ("chunked", Layout(64, block=64)),
    ],
    ids=str,
)
def test_a_mesh_of_data_tensor_and_sequence(kind, layout):
    tokens = of_layout(layout, padding=(3, 0))
    assert_is_plain(tokens, kind, mesh=mesh_of(2, 1, 2, 2), heads=4, groups=2)


@pytest.mark.parametrize("kind", ["flash_interpret", "splash"])
def test_labels_without_a_layout_on_a_mesh(kind):
    assert_is_plain(eso_a(30, two_streams=True), kind, mesh=mesh_of(2, 1, 1, 4))


def test_fsdp_and_tensor_need_no_communication():
    mesh = mesh_of(1, 4, 2, 1)
    tokens = of_layout(Layout(20, queries=20), padding=(0, 2, 0, 1))
    place = sharding.named_sharding(mesh, "rows", "heads", "tokens", None)
    q, k, v, _ = (jax.device_put(a, place) for a in draw(tokens))
    tokens = jax.device_put(tokens, sharding.rows(mesh))

    def loss(q, k, v, tokens):
        return attend(q, k, v, tokens, tokens, kind="chunked", mesh=mesh)

    step = jax.jit(lambda *a: jax.vjp(functools.partial(loss, tokens=a[3]), *a[:3])[1](a[0]))
    text = step.lower(q, k, v, tokens).compile().as_text()
    assert not [op for op in ("all-gather", "all-reduce", "all-to-all", "permute") if op in text]


@pytest.mark.parametrize("kind", SKIPPING)
def test_in_a_scan_of_checkpointed_layers_on_a_mesh(kind):
    tokens = of_layout(Layout(32, queries=32), padding=(0, 3))
    q, _, _, grad = draw(tokens)

    def loss(q, mesh, kind):
        def layer(h, _):
            return h + attend(h, h, h, tokens, tokens, kind=kind, mesh=mesh), None

        h, _ = jax.lax.scan(jax.checkpoint(layer), q, None, length=2)
        return jnp.sum(h * grad)

    with compiled_for(kind):
        got = jax.jit(jax.grad(loss), static_argnums=(1, 2))(q, mesh_of(2, 1, 2, 2), kind)
    want = jax.jit(jax.grad(loss), static_argnums=(1, 2))(q, None, "dense")
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_memory_of_chunked_is_linear():
    def temporary_bytes(length):
        tokens = of_layout(Layout(length), padding=(0,))
        q, k, v, grad = draw(tokens, heads=2, groups=2, width=32)

        def gradients(q, k, v, grad):
            attention = functools.partial(attend, queries=tokens, keys=tokens, kind="chunked")
            return jax.vjp(attention, q, k, v)[1](grad)

        compiled = jax.jit(gradients).lower(q, k, v, grad).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(1024), temporary_bytes(4096)
    assert long < 4.4 * short
    assert long < 2 * 4096**2  # half of one float32 matrix of scores of one head


def visible_blocks(layout):
    return int((np.asarray(_kernel(layout, 1, 2, True).fwd_mask_info.block_mask) > 0).sum())


def test_splash_loads_two_causal_passes_for_two_streams():
    blocks = 4
    causal = visible_blocks(Layout(512 * blocks))
    assert causal == blocks * (blocks + 1) // 2
    assert visible_blocks(Layout(512 * blocks, queries=512 * blocks)) == 2 * causal + blocks


def test_splash_compiles_for_a_tpu(monkeypatch):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    mesh = Mesh(np.array(chips).reshape(2, 2, 2, 2), sharding.AXES)
    layout = Layout(1024, queries=500, block=4)

    def shape(size, dtype, *logical):
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding.named_sharding(mesh, *logical))

    total, split = 1524, ("rows", "heads", "tokens", None)
    q = shape((8, 12, total, 64), jnp.bfloat16, *split)
    k = shape((8, 4, total, 64), jnp.bfloat16, *split)
    rank = shape((8, total), jnp.int32, "rows", "tokens")
    in_context = shape((8, total), bool, "rows", "tokens")

    def gradients(q, k, v, rank, in_context):
        tokens = Tokens(rank, rank, rank, in_context, layout=layout)
        attention = functools.partial(attend, queries=tokens, keys=tokens, kind="splash", mesh=mesh)
        out, pull = jax.vjp(attention, q, k, v)
        return pull(out)

    compiled = jax.jit(gradients).lower(q, k, k, rank, in_context).compile()
    assert compiled.as_text().count("tpu_custom_call") == 3  # forward, dq, dk with dv
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 6 * 762 * 1524  # no scores


@pytest.mark.parametrize("capability", [None, "8.0"])
@pytest.mark.parametrize("width", [20, 80, 130])
def test_flash_pads_the_width_of_a_head(width, capability, monkeypatch):
    """By programs of one and of two blocks, of which the last ones overlap: 144 tokens are five
    blocks of 32."""
    monkeypatch.setattr("esolm_jax.attention.flash.capability", lambda device: capability)
    owns = {
        flash.shape(kernel, width, 5, capability).own
        for kernel in (flash_kernels.forward_kernel, flash_kernels.keys_kernel)
    }
    assert owns == {(20, None): {1, 2}, (80, None): {2}}.get((width, capability), {1})
    tokens = of_layout(LAYOUTS["last_queries"])
    assert_is_plain(tokens, "flash_interpret", heads=4, groups=2, width=width)


@pytest.mark.parametrize("name", ["causal", "mdlm"])
def test_cudnn_masks(name, monkeypatch):
    """By its own implementation, not by flash: padded heads, padding, and a mesh of heads."""
    monkeypatch.setattr("esolm_jax.attention.flash.flash", None)
    tokens = of_layout(LAYOUTS[name], padding=(0, 7))
    mesh = mesh_of(2, 2, 2, 1)
    tokens = jax.tree.map(lambda a: jnp.concatenate([a, a]), tokens)
    assert_is_plain(tokens, "cudnn_interpret", heads=4, groups=2, width=20, mesh=mesh)


def test_cudnn_leaves_float32_to_flash(monkeypatch):
    """A judge computes in float32, even if its config says cudnn."""
    monkeypatch.setattr(jax.nn, "dot_product_attention", None)
    monkeypatch.setattr("esolm_jax.attention.flash.flash", lambda q, k, v, *labels, **_: q + v)
    tokens = of_layout(LAYOUTS["causal"])
    q, k, v, _ = draw(tokens)
    np.testing.assert_array_equal(attend(q, k, v, tokens, tokens, kind="cudnn"), q + v)


def test_cudnn_that_is_not_installed_is_told(monkeypatch):
    def missing(*args, **kwargs):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", missing)
    tokens = of_layout(LAYOUTS["causal"])
    q, k, v, _ = draw(tokens, dtype=jnp.bfloat16)
    with pytest.raises(UserError, match="config.model.attention='cudnn': .* not installed"):
        attend(q, k, v, tokens, tokens, kind="cudnn")


def test_cudnn_runs_forward_once_under_remat():
    """Its residuals have the name that remat keeps."""
    tokens = of_layout(Layout(32), padding=(0,))
    q, k, v, grad = draw(tokens)

    def loss(q, k, v, saved):
        attention = functools.partial(attend, queries=tokens, keys=tokens, kind="cudnn_interpret")
        policy = jax.checkpoint_policies.save_only_these_names(*saved)
        return jnp.sum(jax.checkpoint(attention, policy=policy)(q, k, v) * grad)

    def products(*saved):
        of = functools.partial(loss, saved=saved)
        text = jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2))).lower(q, k, v).as_text()
        return text.count("= stablehlo.dot_general")

    assert (products("attention"), products()) == (2 + 4, 2 + 1 + 4)


def test_cudnn_keeps_no_operand_by_the_name_of_the_result(capsys):
    """Keys and values have names of their own: remat=attention keeps none of them."""
    tokens = of_layout(Layout(32), padding=(0,))
    q, k, v, _ = draw(tokens, heads=2, groups=1)
    attention = functools.partial(attend, queries=tokens, keys=tokens, kind="cudnn_interpret")
    policy = jax.checkpoint_policies.save_only_these_names("attention")
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(attention, policy=policy), q, k, v)
    kept = [x for x in capsys.readouterr().out.splitlines() if "named 'attention'" in x]
    assert kept and not any(x.startswith("f32[1,32,1,16]") for x in kept)


def test_blocks_that_nobody_sees():
    """Two streams are two causal passes and a diagonal, of blocks of 32 as of 64."""
    for block in 32, 64:
        causal = recompute.block_mask(Layout(4 * block), None, block).sum()
        both = recompute.block_mask(Layout(4 * block, 4 * block), None, block).sum()
        assert (causal, both) == (10, 24)
    tokens = eso_a(128, two_streams=False)
    labels = [jnp.asarray(a) for a in (tokens.rank, tokens.in_context) * 2]
    blocks = recompute.block_mask(None, labels, 32)
    mask = np.asarray(dense_mask(tokens, tokens)).any(axis=0).reshape(4, 32, 4, 32)
    np.testing.assert_array_equal(blocks, mask.any(axis=(1, 3)))


@pytest.mark.parametrize("known", [True, False], ids=["layout", "labels"])
def test_flash_visits_what_is_seen_alone(known):
    table = recompute.block_mask(Layout(256, queries=128), None, 32)
    for seen in table, table.T:
        indices, count = map(np.asarray, _visible_blocks(seen if known else jnp.asarray(seen)))
        for row, index, number in zip(seen, indices, count, strict=True):
            np.testing.assert_array_equal(index[:number], np.flatnonzero(row))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("layout", [Layout(200, queries=100), None], ids=["layout", "labels"])
def test_flash_lowers_for_a_gpu(layout, dtype):
    """As far as Triton's language: its compiler comes with the GPU's jaxlib."""
    tokens = of_layout(Layout(200, queries=100)).replace(layout=layout)
    q, k, v, grad = draw(tokens, heads=4, groups=2, width=80, dtype=dtype)

    def gradients(q, k, v, grad):
        attention = functools.partial(attend, queries=tokens, keys=tokens, kind="flash")
        return jax.vjp(attention, q, k, v)[1](grad)

    gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        traced = jax.jit(gradients).trace(q, k, v, grad)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @\S*triton", text)) == 3  # forward, dq, dk with dv


def test_kinds():
    assert [resolve("auto", p, 256) for p in ("cpu", "gpu", "tpu")] == [
        "chunked",
        "flash",
        "splash",
    ]
    assert resolve("auto", "tpu", 128) == "chunked"
    assert [resolve(kind, "tpu", 256) for kind in KINDS] == list(KINDS)
    tokens = of_layout(Layout(4))
    q, k, v, _ = draw(tokens)
    with pytest.raises(ValueError, match="dense, chunked, flash, cudnn, splash"):
        attend(q, k, v, tokens, tokens, kind="sparse")
    with pytest.raises(ValueError, match="S=4: must be 5"):
        wrong = tokens.replace(layout=Layout(5))
        attend(q, k, v, wrong, wrong, kind="splash_interpret")
