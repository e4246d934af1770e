"""python -m benchmarks.attention: times all attention implementations of this device.

Forward and backward pass of one layer over the labels of each objective, interleaved in one run,
with the error of each against dense attention in float32. Use it to choose `model.attention` for a
device, such as flash or chunked on a GPU. Writes docs/attention.{json,md}.
"""

import argparse
import functools
import pathlib

import jax
import jax.numpy as jnp

from benchmarks import interleaved_timings, report_writer
from esolm_jax.attention import attend as attention
from esolm_jax.attention import cudnn
from esolm_jax.attention import kinds as kinds_lib
from esolm_jax.family.labels import Layout, Tokens


def passes(length: int) -> dict[str, Tokens]:
    """One row of each objective; eso_b's sequential phase is that at α₀ = 0.5, trimmed."""
    layouts = {
        "ar, eso_b diffusion": Layout(length),
        "mdlm": Layout(length, block=length),
        "bd3 16": Layout(length, length, 16),
        "eso_b sequential": Layout(length, length // 2 + length // 16),
    }
    found = {}
    for name, layout in layouts.items():
        index = jnp.arange(layout.queries + layout.length, dtype=jnp.int32)
        rank, in_context = (jnp.asarray(label) for label in layout.labels(index))
        rank = rank.astype(jnp.int32)
        found[name] = Tokens(index[None], index[None], rank[None], in_context[None], layout)
    found["eso_b without a layout"] = found["eso_b sequential"].replace(layout=None)
    return found


def kinds(tokens: Tokens, platform: str, dtype: str, width: int) -> list[str]:
    """The kinds of the platform that compute these tokens themselves, not by another kind."""
    names = [k for k in kinds_lib.KINDS if kinds_lib.PLATFORM.get(k, platform) == platform]
    fits_cudnn = dtype == "bfloat16" and width <= kinds_lib.CUDNN_WIDTH
    computes = {
        "splash": tokens.layout is not None,
        "cudnn": fits_cudnn and cudnn.has_mask(tokens.layout),
    }
    return [k for k in names if computes.get(k, True)]


@functools.partial(jax.jit, static_argnames="kind")
def step(tokens: Tokens, q, k, v, grad, *, kind: str):
    """The result, and the gradients of q, k and v for the gradient `grad` of the result."""
    run = functools.partial(attention.attend, queries=tokens, keys=tokens, kind=kind)
    out, pull = jax.vjp(run, q, k, v)
    return out, *pull(grad)


def error(found, exact) -> float:
    """The largest difference relative to the largest value, over the result and each gradient."""
    pairs = zip(found, exact, strict=True)
    return max(float(jnp.abs(a.astype(b.dtype) - b).max() / jnp.abs(b).max()) for a, b in pairs)


def measure(tokens: Tokens, arguments) -> dict[str, dict]:
    """Median milliseconds of each kind, and its error against dense in float32."""
    shape = arguments.rows, arguments.heads, tokens.rank.shape[1], arguments.width
    keys = jax.random.split(jax.random.key(0), 4)
    operands = [jax.random.normal(key, shape, arguments.dtype) for key in keys]
    tokens = jax.tree.map(lambda a: jnp.broadcast_to(a, (arguments.rows, a.shape[1])), tokens)
    with jax.default_matmul_precision("highest"):
        exact = step(tokens, *(a.astype(jnp.float32) for a in operands), kind="dense")
    names = kinds(tokens, jax.default_backend(), arguments.dtype, arguments.width)
    errors = {kind: error(step(tokens, *operands, kind=kind), exact) for kind in names}
    calls = [functools.partial(step, tokens, *operands, kind=kind) for kind in names]
    seconds, _ = interleaved_timings.timed(calls, arguments.repeats)
    return {k: {"ms": 1e3 * s, "error": errors[k]} for k, s in zip(names, seconds, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=1024, help="L")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/attention"))
    arguments = parser.parse_args()
    found = {name: measure(row, arguments) for name, row in passes(arguments.length).items()}
    device = jax.devices()[0].device_kind
    text = f"# Speed of the attention implementations ({device})\n\n"
    text += f"Made by `python -m benchmarks.attention`: {arguments.rows} x {arguments.heads} heads "
    text += (
        f"of {arguments.width}, L = {arguments.length}, {arguments.dtype}, forward and backward "
    )
    text += "pass of one layer.\n\n"
    head = "labels", "kind", "ms", "speed, x chunked", "largest error / largest value"
    lines = []
    for name, row in found.items():
        for kind, cell in row.items():
            speed = row["chunked"]["ms"] / cell["ms"]
            figures = f"{cell['ms']:.2f}", f"{speed:.2f}", f"{cell['error']:.1e}"
            lines.append((name, kind, *figures))
    figures = {"device": device, "rows": found}
    report_writer.write(arguments.out, figures, text + report_writer.table(head, lines))


if __name__ == "__main__":
    main()
