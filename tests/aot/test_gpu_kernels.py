"""Our GPU kernels, as the GPU's compiler makes them, executed on a CPU.

Interpret mode shows that a kernel's mathematics is right. What it cannot show: what Triton makes of
it (layouts, asynchronous copies, inline assembly, numbers that are loaded and not there), and
programs that race, since it runs them one by one.
"""

import dataclasses
import functools
import re

import gpu_kernels
import jax.numpy as jnp
import numpy as np
import ptx.machine
import pytest
from ptx.memory import Fault
from styles import DIT, LLAMA

from benchmarks.attention import passes
from esolm_jax.aot import topology
from esolm_jax.attention import flash
from esolm_jax.sampling.engine import decode_gpu, project_gpu
from esolm_jax.sampling.engine.cache import Heads, Visible
from esolm_jax.sampling.engine.quantize import Quantized, quantize
from esolm_jax.sampling.engine.residual import Layer, Residual

pytest.importorskip("jax_cuda12_plugin")

TOLERANCE = 3e-3  # of bfloat16; and of float32, whose products are of TF32
GPUS = ["h100", "a100"]


def capability(gpu):
    return flash.capability(topology.devices(f"{gpu}:1")[0])


def normal(*shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), dtype)


@pytest.mark.parametrize(
    ("gpu", "objective", "width", "heads", "dtype"),
    [
        ("h100", "mdlm", 64, 1, "bfloat16"),
        ("h100", "eso_b without a layout", 128, 2, "bfloat16"),
        ("h100", "bd3 16", 256, 1, "bfloat16"),
        ("h100", "eso_b sequential", 64, 1, "float32"),
        ("a100", "ar, eso_b diffusion", 64, 2, "bfloat16"),
        ("a100", "bd3 16", 128, 1, "bfloat16"),
    ],
)
def test_attention(gpu, objective, width, heads, dtype):
    """Forward and backward kernels; `heads`: of each of two groups."""
    tokens = passes(128)[objective]
    labels = (tokens.rank, tokens.in_context) * 2
    length = tokens.rank.shape[1]
    q, grad = (normal(1, 2, heads, length, width, dtype=dtype, seed=seed) for seed in (0, 1))
    k, v = (normal(1, 2, length, width, dtype=dtype, seed=seed) for seed in (2, 3))

    def run(q, k, v, grad, labels, *, interpret):
        impl = flash._impl(flash.Options(width**-0.5, capability(gpu), interpret))
        out, lse = impl.forward(tokens.layout, q, k, v, labels)
        delta = (out.astype(jnp.float32) * grad.astype(jnp.float32)).sum(axis=-1)
        return out, impl.backward(tokens.layout, q, k, v, labels, grad, lse, delta)

    assert gpu_kernels.check(gpu, run, (q, k, v, grad, labels), "flash_", TOLERANCE) == 3


DECODING = {  # batch, window, groups, heads of a group, width, slots, filled, dtype, cache, normed
    "one text": (1, 2, 3, 1, 64, 512, [300], "bfloat16", "auto", False),
    "rows differ": (3, 5, 2, 4, 32, 256, [0, 129, 256], "bfloat16", "auto", True),
    "odd width": (1, 9, 2, 2, 80, 128, [77], "bfloat16", "auto", False),
    "a prompt": (1, 70, 1, 1, 64, 256, [200], "bfloat16", "auto", True),
    "no cache": (2, 9, 2, 2, 32, 0, [0], "bfloat16", "auto", False),
    "float32": (1, 3, 2, 1, 64, 256, [130], "float32", "auto", True),
    "int8": (2, 2, 2, 2, 64, 256, [256, 31], "bfloat16", "int8", False),
    "float8": (2, 2, 2, 2, 64, 256, [256, 31], "bfloat16", "float8_e4m3fn", False),
}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", DECODING)
def test_decoding_attention(name, gpu):
    """Slots that are not filled are NaN, where the cache can hold it."""
    if name == "float8" and gpu == "a100":
        pytest.skip("an A100 has no float8")
    batch, window, groups, heads, width, slots, filled, dtype, cache, normed = DECODING[name]
    angle = normal(batch, window, width)
    of_heads = Heads(
        normal(batch, window, groups, heads + 2, width, dtype=dtype),
        None if normed else normal(groups, heads + 2, width),
        normal(heads + 1, width) if normed else None,
        angle,
        angle,
        DIT,
    )
    rank = np.random.default_rng(0).permuted(np.tile(np.arange(window), (batch, 1)), axis=1)
    visible = Visible(
        jnp.asarray(rank, jnp.int32),
        normal(batch, window) < 0.5,
        jnp.asarray(filled, jnp.int32),
    )
    past = None
    if slots:
        is_filled = (np.arange(slots) < np.asarray(filled)[:, None])[:, :, None]
        kv = [normal(2, batch, slots, groups * width, seed=seed) for seed in (0, 1)]
        past = tuple(jnp.where(is_filled, a, jnp.nan).astype(dtype) for a in kv)
        if cache != "auto":
            codes = [quantize(a.reshape(2, batch, slots, groups, width), -1, cache) for a in kv]
            past = tuple(
                Quantized(of.codes.reshape(kv[0].shape), jnp.swapaxes(of.scale, 2, 3))
                for of in codes
            )
    run = functools.partial(decode_gpu.attend, block=1)
    count = gpu_kernels.check(gpu, run, (of_heads, visible, past), "decode_", TOLERANCE)
    shares = decode_gpu.Sizes.of(of_heads, past).parts > 1
    assert count == (2 if shares else 1)


PROJECTIONS = {  # model, tokens, terms, features, activates, parts of the residual, weights
    "heads": (DIT, 2, 768, (2, 3, 64), False, 0, "bfloat16"),
    "many columns": (DIT, 1, 300, (1, 2100), True, 1, "bfloat16"),
    "MLP": (DIT, 3, 300, (1, 200), True, 2, "bfloat16"),
    "SwiGLU": (LLAMA, 4, 1100, (2, 72), True, 1, "bfloat16"),
    "int8": (LLAMA, 2, 128, (2, 72), True, 1, "int8"),
    "float8": (DIT, 1, 128, (1, 96), True, 1, "float8_e4m3fn"),
}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections(name, gpu):
    if name == "float8" and gpu == "a100":
        pytest.skip("an A100 has no float8")
    model, tokens, terms, features, activates, parts, weights = PROJECTIONS[name]
    h = normal(1, tokens, terms, dtype="bfloat16")
    residual = Residual(h)
    if parts:
        of_parts = normal(parts, 1, tokens, terms, dtype="bfloat16" if parts == 1 else "float32")
        residual = Residual(h, of_parts, normal(terms))
    kernel = normal(terms, *features) / terms**0.5
    kernel = kernel.astype(weights) if weights == "bfloat16" else quantize(kernel, 0, weights)
    model = dataclasses.replace(model, dtype="bfloat16")
    layer = Layer(kernel, normal(*features) if activates else None, activates, model)
    run = project_gpu.project
    assert gpu_kernels.check(gpu, run, (residual, layer), "decode_project", TOLERANCE) == 1


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(
    "sizes", [(4, 700, 96, "bfloat16"), (2, 3000, 100, "bfloat16"), (1, 2100, 64, "int8")]
)
def test_products(sizes, gpu):
    tokens, terms, columns, dtype = sizes
    x, kernel = normal(1, tokens, terms, dtype="bfloat16"), normal(terms, columns)
    kernel = quantize(kernel, 0, dtype) if dtype == "int8" else kernel.astype(dtype)
    run = project_gpu.product
    assert gpu_kernels.check(gpu, run, (x, kernel), "decode_product", TOLERANCE) == 1


FAULTS = {  # what is left out of a kernel
    "waiting for copies": (r"cp\.async\.wait_group", "nothing has written"),
    "barriers": (r"bar\.sync", "another warp"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_noticed(name):
    """The machine would else be no test."""
    q, k = normal(1, 1, 1, 128, 64, dtype="bfloat16"), normal(1, 1, 128, 64, dtype="bfloat16")
    labels = (jnp.arange(128)[None], jnp.ones((1, 128), bool)) * 2

    def run(q, k, labels, *, interpret):
        impl = flash._impl(flash.Options(1.0, capability("h100"), interpret))
        return impl.forward(None, q, k, k, labels)

    (call,) = gpu_kernels.interpret(lambda *a: run(*a, interpret=True), (q, k, labels))
    (kernel,) = gpu_kernels.compile_for(
        "h100", lambda *a: run(*a, interpret=False), (q, k, labels), "flash_"
    )
    pattern, message = FAULTS[name]
    faulty = dataclasses.replace(kernel, text=re.sub(pattern, "fence", kernel.text))
    with pytest.raises(Fault, match=message):
        faulty.execute(call, late_copies=True)


RACE = """
.entry race(
    .param .u64 race_param_0,
    .param .u64 race_param_1
)
.reqntid 32, 1, 1
{
    .reg .b32 %r<4>;
    .reg .b64 %rd<4>;
    ld.param.b64 %rd0, [race_param_1];
    mov.u32 %r0, %ctaid.x;
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd1, %r1, 4;
    add.s64 %rd2, %rd0, %rd1;
    st.global.b32 [%rd2], {VALUE};
    ret;
}
"""


@pytest.mark.parametrize(("value", "races"), [("%r1", {}), ("%r0", {"different writes": 32})])
def test_races_are_noticed(value, races):
    """Two programs write to the same numbers: the same, or not."""
    result = np.zeros(32, np.int32)
    text = RACE.replace("{VALUE}", value)
    _, found, _ = ptx.machine.execute(
        text, "race", (2, 1, 1), 0, [result], [result], late_copies=False
    )
    assert dict(found) == races
