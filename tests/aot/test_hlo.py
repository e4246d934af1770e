"""Costs read from HLO text, against the same counted by hand; for CPUs, TPUs and GPUs."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from esolm_jax.aot import hlo, topology

pytestmark = pytest.mark.fast_compile

BF16, F32 = jnp.bfloat16, jnp.float32


def cpu(**axes):
    return Mesh(np.array(jax.devices()).reshape(tuple(axes.values())), tuple(axes))


@pytest.fixture(scope="module")
def tpu():
    """Mesh axes → a mesh over the first chips of a v5e:4x4 that is not there."""
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices

    def mesh(**axes):
        shape = tuple(axes.values())
        return Mesh(np.array(chips[: int(np.prod(shape))]).reshape(shape), tuple(axes))

    return mesh


@pytest.fixture(params=["cpu", "tpu", "gpu"])
def single(request):
    """A mesh of one device, of each kind."""
    if request.param == "cpu":
        return Mesh(np.array(jax.devices()[:1]), ("x",))
    if request.param == "gpu":
        pytest.importorskip("jax_cuda12_plugin")
        return Mesh(np.array(topology.devices("h100:1")), ("x",))
    return request.getfixturevalue("tpu")(x=1)


def analyse(mesh, function, *arguments, **options):
    """Arguments: (shape, dtype, *spec)."""
    of = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
        for shape, dtype, *spec in arguments
    ]
    return hlo.analyse(jax.jit(function).lower(*of).compile().as_text(), **options)


def scan(weights, x):
    def layer(h, w):
        with jax.named_scope("layer"):
            return jnp.tanh(h @ w), None

    return jax.lax.scan(layer, x, weights)[0]


def total(function):
    return lambda *a: function(*a).astype(F32).sum()


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_matrix_products(single, dtype):
    cost = analyse(
        single, lambda a, b, c: jnp.tanh(a @ b) @ c,
        *[((128, 256), dtype), ((256, 384), dtype), ((384, 512), dtype)],
    )  # fmt: skip
    assert cost.flops == 2 * 128 * 256 * 384 + 2 * 128 * 384 * 512
    assert not cost.collectives and not cost.unknown_loops and not cost.kernels


@pytest.mark.parametrize("equations", ["bhtk,bhsk->bhts bhts,bhsk->bhtk",
                                       "bthk,bshk->bhts bhts,bshk->bthk"])  # fmt: skip
def test_batched_products_and_their_gradients(single, equations):
    """Batch dimensions become spatial ones on a TPU, which must not be counted as work."""
    scores, values = equations.split()
    b, h, t, k = 2, 3, 256, 64
    shape = tuple(dict(b=b, h=h, t=t, k=k)[axis] for axis in scores.split(",")[0])

    def attend(q, k, v):
        return jnp.einsum(values, jnp.tanh(jnp.einsum(scores, q, k)), v)

    arguments = [(shape, BF16)] * 3
    one = 2 * b * h * t * t * k
    assert analyse(single, attend, *arguments).flops == 2 * one
    gradient = jax.grad(total(attend), (0, 1, 2))
    assert analyse(single, gradient, *arguments).flops == 5 * one  # the sum needs no second product


def test_matrix_times_vector(single):
    if single.devices.flat[0].platform == "gpu":
        pytest.skip("XLA's GPU compiler puts multiply and reduce in two fusions: not counted")
    assert analyse(single, lambda a, b: a @ b, ((512,), BF16), ((512, 256), BF16)).flops == 2**18


@pytest.mark.parametrize(
    "window",
    [
        dict(window_strides=(2, 2), padding="SAME", feature_group_count=2),
        dict(window_strides=(1, 3), padding=((2, 1), (0, 4)), lhs_dilation=(2, 3)),
        dict(window_strides=(2, 1), padding=((3, 0), (1, 1)), rhs_dilation=(2, 3)),
        dict(window_strides=(3, 2), padding=((1, 5), (2, 2)), lhs_dilation=(2, 3),
             rhs_dilation=(3, 2)),
        dict(window_strides=(1, 1), padding="VALID", batch_group_count=2),
    ],
)  # fmt: skip
def test_convolutions_count_only_taps_on_input(window):
    """A convolution of ones with ones adds up to the number of its multiplications."""

    def convolve(x, w):
        labels = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, **window, dimension_numbers=labels)

    x, w = jnp.ones((2, 9, 8, 4)), jnp.ones((3, 2, 4 // window.get("feature_group_count", 1), 6))
    text = jax.jit(convolve).lower(x, w).compile().as_text()
    assert hlo.analyse(text).flops == 2 * convolve(x, w).sum()


def test_scan_forward_and_backward(single):
    layers, rows, width = 5, 64, 256
    arguments = ((layers, width, width), BF16), ((rows, width), BF16)
    forward = 2 * layers * rows * width**2
    kinds = {r"transpose\(.*layer": "backward", "layer": "forward"}
    assert analyse(single, scan, *arguments, kinds=kinds).flops_by_kind == {"forward": forward}
    cost = analyse(single, jax.grad(total(scan), (0, 1)), *arguments, kinds=kinds)
    assert cost.flops_by_kind == {"forward": forward, "backward": 2 * forward}
    assert cost.flops == 3 * forward
    assert all(len(product.loops) == 1 for product in cost.products)
    remat = lambda w, x: jax.lax.scan(  # noqa: E731
        jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, w)[0]  # fmt: skip
    assert analyse(single, jax.grad(total(remat), (0, 1)), *arguments).flops == 4 * forward


def test_nested_loops(single):
    def run(weights, x):
        twice = lambda i, h: scan(weights, h) @ weights[0]  # noqa: E731
        return jax.lax.fori_loop(3, 10, twice, x)

    cost = analyse(single, run, ((4, 128, 128), F32), ((32, 128), F32))
    assert cost.flops == 7 * (4 + 1) * 2 * 32 * 128**2


def test_loops_that_depend_on_data(single):
    def run(x, w, n):
        with jax.named_scope("until"):
            step = lambda c: (c[0] + 1, jnp.tanh(c[1] @ w))  # noqa: E731
            return jax.lax.while_loop(lambda c: (c[0] < n) & (c[1][0, 0] < 9), step, (0, x))

    arguments = ((64, 128), F32), ((128, 128), F32), ((), jnp.int32)
    one = 2 * 64 * 128**2
    cost = analyse(single, run, *arguments)
    assert cost.flops == one
    assert len(cost.unknown_loops) == 1 and "until/while" in cost.unknown_loops[0].op_name
    cost = analyse(single, run, *arguments, trip_counts={"until": 12.5}, strict=True)
    assert cost.flops == 12.5 * one and not cost.unknown_loops
    with pytest.raises(hlo.UnknownLoop, match="until/while"):
        analyse(single, run, *arguments, trip_counts={"other": 2}, strict=True)


def test_conditionals_count_the_usual_branch(single):
    def run(p, x):
        with jax.named_scope("rarely"):
            return jax.lax.cond(p, lambda x: (x @ x) @ x, lambda x: jnp.tanh(x @ x), x)

    arguments = ((), jnp.bool_), ((256, 256), F32)
    one = 2 * 256**3
    assert analyse(single, run, *arguments).flops == 2 * one
    assert analyse(single, run, *arguments, branches={"rarely": 0}).flops == one
    assert analyse(single, run, *arguments, branches={"rarely": 1}).flops == 2 * one


def test_tensor_parallel_all_reduce(tpu):
    for mesh, data, n in [(cpu(data=2, tensor=4), 2, 4), (tpu(data=4, tensor=4), 4, 4)]:
        cost = analyse(
            mesh,
            lambda x, a, b: jnp.tanh(x @ a) @ b,
            ((64 * data, 256), F32, "data"),
            ((256, 512 * n), F32, None, "tensor"),
            ((512 * n, 256), F32, "tensor"),
        )
        assert cost.flops == 4 * 64 * 256 * 512
        # The TPU compiler may send bfloat16, as its products do.
        width = {"bf16": 2, "f32": 4}[cost.messages[0].dtype]
        assert cost.collectives == {"all-reduce": 2 * 64 * 256 * width * (n - 1) / n}
        assert cost.messages[0].shape == (64, 256) and not cost.messages[0].in_loop


def fsdp_step(weights, x):
    """Rows and weights over the same axis; the loss is a mean."""
    loss = lambda w, x: jnp.mean(scan(w.astype(BF16), x).astype(F32) ** 2)  # noqa: E731
    return weights - jax.grad(loss)(weights, x)


def test_fsdp_scan_on_tpu(tpu):
    """4 data x 4 fsdp: every layer is gathered in the loop, twice; its gradient is scattered."""
    layers, rows, width = 6, 128, 2048
    cost = analyse(
        tpu(data=4, fsdp=4),
        fsdp_step,
        ((layers, width, width), F32, None, None, "fsdp"),
        ((16 * rows, width), BF16, ("data", "fsdp")),
    )
    assert cost.flops == 3 * 2 * layers * rows * width**2
    matrix = 2 * width**2  # bytes, in bfloat16
    assert cost.collectives["all-gather"] == 2 * layers * matrix * 3 / 4
    gathers = [m for m in cost.messages if m.kind == "all-gather"]
    assert all(m.in_loop and m.executions == layers and m.group == 4 for m in gathers)
    assert all(sorted(m.shape)[-2:] == [width, width] and m.dtype == "bf16" for m in gathers)
    # JAX 0.11 names the slice of the stack in front of the scope.
    assert all(re.search("layer|while/body", m.op_name) for m in gathers)
    assert cost.collectives["reduce-scatter"] == layers * matrix * 3 / 4
    # What is left of a gradient is added up over `data`; beside it only scalars.
    assert cost.collectives["all-reduce"] == pytest.approx(
        layers * 2 * (matrix / 4) * 3 / 4, abs=32
    )


def test_collective_matrix_products_on_tpu(tpu):
    """One axis of 16: the compiler permutes shards in inner loops, beside the products."""
    layers, rows, width = 2, 4096, 2048
    cost = analyse(
        tpu(fsdp=16),
        scan,
        ((layers, width, width), BF16, None, "fsdp"),
        ((16 * rows, width), BF16, "fsdp"),
    )
    assert cost.flops == 2 * layers * rows * width**2
    shard = 2 * width**2 / 16
    # A ring both ways: one shard before the inner loop, then four in each of its four executions.
    assert cost.collectives == {"collective-permute": layers * 17 * shard}
    assert {len(m.loops) for m in cost.messages} == {1, 2}


def test_gather_before_the_loop_is_seen():
    layers, width = 6, 128
    mesh = cpu(fsdp=8)

    def run(weights, x):
        whole = jax.lax.with_sharding_constraint(weights, NamedSharding(mesh, P()))
        return scan(whole, x)

    cost = analyse(
        mesh, run, ((layers, width, width), F32, None, "fsdp"), ((64, width), F32, "fsdp")
    )
    (gather,) = [m for m in cost.messages if m.kind == "all-gather"]
    assert gather.shape == (layers, width, width) and not gather.in_loop
    assert gather.bytes == 4 * layers * width**2 * 7 / 8 and gather.executions == 1


def test_every_kind_of_collective():
    """By shard_map on CPU, so that each is what was asked for."""
    mesh = cpu(x=8)
    ring = [(i, (i + 1) % 8) for i in range(8)]
    functions = {
        "all-gather": lambda x: jax.lax.all_gather(x, "x", tiled=True),
        "reduce-scatter": lambda x: jax.lax.psum_scatter(x, "x", tiled=True),
        "all-reduce": lambda x: jax.lax.psum(x, "x"),
        "all-to-all": lambda x: jax.lax.all_to_all(x, "x", 1, 0, tiled=True),
        "collective-permute": lambda x: jax.lax.ppermute(x, "x", ring),
    }
    local = 4 * 16 * 64
    sent = [local * 7, local * 7 / 8, 2 * local * 7 / 8, local * 7 / 8, local]
    for (kind, function), expected in zip(functions.items(), sent, strict=True):
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False
        )
        cost = analyse(mesh, mapped, ((128, 64), F32, "x"))
        assert cost.collectives == {kind: expected}


def test_pallas_kernels(tpu):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    layers, heads, length, width = 3, 2, 256, 128
    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.CausalMask((length, length))] * heads
    )
    attend = splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1)

    def run(x):
        return jax.lax.scan(lambda h, _: (attend(h, h, h), None), x, length=layers)[0]

    gradient, arguments = jax.grad(total(run)), ((heads, length, width), BF16)
    cost = analyse(tpu(x=1), gradient, arguments, kernel_flops={"splash_mha_fwd": 1000})
    names = [kernel.name.split("_")[2] for kernel in cost.kernels]
    assert sorted(names) == ["dkv", "dq", "fwd"]
    assert all(kernel.executions == layers for kernel in cost.kernels)
    assert sorted(k.name.split("_")[2] for k in cost.uncounted_kernels) == ["dkv", "dq"]
    forward = cost.kernels[names.index("fwd")]
    assert "pallas_call" in forward.op_name
    assert hlo.Shape("bf16", (heads, length, width)) in forward.operands
    assert hlo.Shape("bf16", (heads, length, width)) in forward.results
    products = sum(p.flops * p.executions for p in cost.products)
    assert cost.flops == products + layers * 1000


def module(*lines, computations=""):
    body = "\n".join(f"  {line}" for line in lines)
    entry = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    return f"HloModule m, num_partitions=16\n\n{computations}\n{entry}"


PARAMETER = "%p = f32[8]{0} parameter(0)"


def triton(name, operand="f32[8]{0} %p"):
    """An instruction as the GPU's compiler writes a Pallas kernel, with its code in the end."""
    return (
        f"%{name} = (bf16[2,4]{{1,0}}, f32[2]{{0}}) custom-call({operand}), "
        'custom_call_target="__gpu$xla.gpu.triton", api_version=API_VERSION_TYPED_FFI, '
        f'metadata={{op_name="jit(f)/attend/{name}_kernel/pallas_call" stack_frame_id=1}}, '
        'backend_config={debug = false, grid_x = 25 : i32, ir = "ML\\EFR(\\0D#\'+/37;"}'
    )


def test_triton_kernels():
    custom = '%c = f32[8]{0} custom-call(%p), custom_call_target="__gpu$other"'
    text = module(PARAMETER, triton("k.1"), triton("k.10"), triton("k.2"), custom)
    text = text.replace("  %c", "  ROOT %c")
    cost = hlo.analyse(text, kernel_flops={"k.1": 5, "k.10": 7}, kinds={"attend": "attention"})
    assert [(kernel.name, kernel.flops) for kernel in cost.kernels] == [
        ("k.1", 5), ("k.10", 7), ("k.2", None)
    ]  # fmt: skip
    assert cost.flops_by_kind == {"attention": 12}
    assert cost.kernels[0].op_name == "jit(f)/attend/k.1_kernel/pallas_call"
    assert cost.kernels[0].operands == (hlo.Shape("f32", (8,)),)
    assert cost.kernels[0].results == (hlo.Shape("bf16", (2, 4)), hlo.Shape("f32", (2,)))
    assert hlo.analyse(text, kernel_flops={"2_kernel/pallas_call": 3}).flops == 3


def test_cublas_products():
    text = module(
        PARAMETER,
        "%a = bf16[1024,2048]{1,0} parameter(1)",
        "%b = bf16[1024,512]{1,0} parameter(2)",
        "%c = (f32[2048,512]{1,0}, s8[4096]{0}) custom-call(%a, %b), "
        'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{'
        '"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],'
        '"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[]}}}',
        "ROOT %r = f32[8]{0} copy(%p)",
    )
    assert hlo.analyse(text).flops == 2 * 2048 * 512 * 1024


@pytest.mark.parametrize(
    ("target", "mask", "flops"),
    [
        ("fmhaSoftmax", "PADDING", 2 * 2 * 4 * 12 * 100 * 100 * 64),
        ("fmhaSoftmax", "CAUSAL", 2 * 2 * 4 * 12 * 5050 * 64),
        ("fmhaSoftmaxBackward", "CAUSAL", 5 * 2 * 4 * 12 * 5050 * 64),
    ],
)
@pytest.mark.parametrize("space", ["", " "])
def test_products_of_cudnn_attention(target, mask, flops, space):
    text = module(
        PARAMETER,
        "%q = bf16[4,100,12,64]{3,2,1,0} parameter(1)",
        "%k = bf16[4,100,6,64]{3,2,1,0} parameter(2)",
        "%a = (bf16[4,12,100,64]{3,1,2,0}, f32[4,12,100]{2,1,0}) custom-call(%q, %k, %k), "
        f'custom_call_target="__cudnn${target}", backend_config='
        f'{{"cudnn_fmha_backend_config": {{"fmha_scale": 0.125, "mask_type":{space}"{mask}"}}}}',
        "ROOT %r = f32[8]{0} copy(%p)",
    )
    assert hlo.analyse(text).flops == flops


@pytest.mark.parametrize("is_swapped", [False, True])
def test_branches_keep_their_numbers_if_the_predicate_is_negated(is_swapped):
    branches = "".join(
        f"%b{n} (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n"
        f"  ROOT %r = f32[8]{{0}} all-reduce(%x), replica_groups={{{{0,{n + 1}}}}}, "
        f'metadata={{op_name="jit(f)/trimmed/cond/branch_{n}_fun/psum"}}\n}}\n\n'
        for n in range(2)
    )
    true, false = (0, 1) if is_swapped else (1, 0)
    text = module(
        PARAMETER,
        "%q = pred[] constant(true)",
        f"ROOT %c = f32[8]{{0}} conditional(%q, %p, %p), true_computation=%b{true}, "
        f'false_computation=%b{false}, metadata={{op_name="jit(f)/trimmed/cond" stack_frame_id=1}}',
        computations=branches,
    )
    for n in range(2):
        (message,) = hlo.analyse(text, branches={"trimmed/cond": n}).messages
        assert f"branch_{n}_fun" in message.op_name


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,1},{2,3}}", 2),
        ("{{0}}", 1),
        ("{}", 16),
        ("[2,8]<=[16]", 8),
        ("[4,4]<=[4,4]T(1,0)", 4),
        ("mesh['axis_0'=16,'axis_1'=1] {'axis_0','axis_1'}", 16),
        ("mesh['axis_0'=1,'axis_1'=4,'axis_2'=4], device_ids=([4,4]T(1,0)) {'axis_1'}", 4),
        ("mesh['axis_0'=16] {'axis_0':(2)4}", 4),
    ],
)
def test_replica_groups(groups, size):
    text = module(
        PARAMETER,
        f"ROOT %r = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, "
        'to_apply=%add, metadata={op_name="jit(f)/psum" stack_frame_id=1}',
    )
    cost = hlo.analyse(text)
    assert cost.messages[0].group == size and cost.messages[0].op_name == "jit(f)/psum"
    assert cost.collectives == {"all-reduce": 2 * 32 * (size - 1) / size}


def test_combined_and_asynchronous_collectives_count_once():
    text = module(
        PARAMETER,
        '%q = bf16[2,4]{1,0:T(8,128)(2,1)S(1)} convert(%p), metadata={op_name="b"}',
        "%r = (f32[8]{0}, bf16[2,4]{1,0}) all-reduce(%p, /*index=1*/%q), "
        "replica_groups=[4,4]<=[16]",
        "%s = (bf16[2,4]{1,0}, bf16[2,16]{1,0}) all-gather-start(%q), replica_groups=[4,4]<=[16], "
        "dimensions={1}",
        "%t = bf16[2,16]{1,0} all-gather-done(%s)",
        "%u = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%p), calls=%wrapped",
        "%v = f32[2]{0} async-done(%u), calls=%wrapped",
        "%w = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p), "
        "source_target_pairs={{0,1},{1,0},{2,2}}",
        "ROOT %x = f32[8]{0} collective-permute-done(%w)",
        computations="%wrapped (a: f32[8]) -> f32[2] {\n  %a = f32[8]{0} parameter(0)\n"
        "  ROOT %b = f32[2]{0} reduce-scatter(%a), replica_groups=[4,4]<=[16], dimensions={0}\n}\n",
    )
    cost = hlo.analyse(text)
    assert cost.collectives == {
        "all-reduce": 2 * (32 + 16) * 3 / 4,
        "all-gather": 64 * 3 / 4,
        "reduce-scatter": 32 * 3 / 4,
        "collective-permute": 32,
    }
    assert [(m.kind, m.dtype, m.shape) for m in cost.messages] == [
        ("all-reduce", "f32", (8,)),
        ("all-reduce", "bf16", (2, 4)),
        ("all-gather", "bf16", (2, 16)),
        ("reduce-scatter", "f32", (8,)),
        ("collective-permute", "f32", (8,)),
    ]
    assert cost.messages[1].op_name == "b"


@pytest.mark.parametrize("first, step, direction, limit, count", [
    (0, 1, "LT", 6, 6), (0, 2, "LT", 7, 4), (1, 3, "LE", 10, 4), (9, -1, "GT", 0, 9),
    (9, -2, "GE", 1, 5), (0, 4, "NE", 12, 3), (8, 1, "LT", 6, 0), (0, 0, "LT", 6, None),
])  # fmt: skip
def test_trip_counts_without_backend_config(first, step, direction, limit, count):
    """The limit is carried along, as the TPU's compiler likes to."""
    computations = f"""%body (c: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {{
  %c = (s32[], s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=1
  %x = f32[8]{{0}} get-tuple-element(%c), index=2
  %d = s32[] constant({step})
  %j = s32[] add(%i, %d)
  %y = f32[8]{{0}} all-reduce(%x), replica_groups={{{{0,1}}}}
  ROOT %t = (s32[], s32[], f32[8]{{0}}) tuple(%j, %n, %y)
}}

%cond (c: (s32[], s32[], f32[8])) -> pred[] {{
  %c = (s32[], s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=1
  ROOT %r = pred[] compare(%i, %n), direction={direction}
}}
"""
    text = module(
        PARAMETER,
        f"%i = s32[] constant({first})",
        f"%n = s32[] constant({limit})",
        "%copy = s32[] copy(%n)",
        "%t = (s32[], s32[], f32[8]{0}) tuple(%i, %copy, %p)",
        "%w = (s32[], s32[], f32[8]{0}) while(%t), condition=%cond, body=%body",
        "ROOT %o = f32[8]{0} get-tuple-element(%w), index=2",
        computations=computations,
    )
    cost = hlo.analyse(text)
    assert len(cost.unknown_loops) == (count is None)
    assert cost.collectives.get("all-reduce", 0) == 32 * (1 if count is None else count)


def test_what_is_no_module():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.analyse("HloModule m")
