"""Runs the artefacts of an export where esolm_jax can't be imported, nor what they need not.

python without_esolm_jax.py FOLDER RUNTIME IN.npz OUT.npz

IN holds labelled tokens, orders and keys for batch sizes 1 and 5; OUT gets logits and greedy texts.
"""

import functools
import pathlib
import sys

FORBIDDEN = {
    "numpy": ("esolm_jax", "jax", "onnx", "onnxruntime", "safetensors"),
    "onnx": ("esolm_jax", "jax", "onnx", "safetensors"),
    "stablehlo": ("esolm_jax", "flax", "onnx", "onnxruntime", "safetensors"),
}
folder, runtime, given, made = sys.argv[1:]
folder = pathlib.Path(folder)
for name in FORBIDDEN[runtime]:
    sys.modules[name] = None  # to import it is an error
sys.path[:] = [path for path in sys.path if pathlib.Path(path or ".").resolve().name != "support"]
sys.path.insert(0, str(folder))

import decode_loop  # noqa: E402
import numpy as np  # noqa: E402
import plain_transformer  # noqa: E402

sample = None
if runtime == "numpy":
    weights, config = plain_transformer.load(folder)
    bound = weights, config["network"]
    score = functools.partial(plain_transformer.score, *bound)
    step = functools.partial(plain_transformer.step, *bound)
elif runtime == "onnx":
    import run_onnx

    config = plain_transformer.load(folder)[1]
    run, step = (run_onnx.load(folder / f"{part}.onnx") for part in ("score", "step"))
    score = lambda *labels: run(*labels)[0]  # noqa: E731
else:
    import run_stablehlo

    config = plain_transformer.load(folder)[1]
    weights = run_stablehlo.load_weights(folder / "weights.safetensors")
    score, step, sample = (
        functools.partial(run_stablehlo.load(folder / f"{part}.stablehlo"), weights)
        for part in ("score", "step", "sample")
    )

found, arrays = {}, np.load(given)
for batch in (1, 5):
    labels = [arrays[f"{name}_{batch}"] for name in ("token", "position", "rank", "in_context")]
    found[f"logits_{batch}"] = np.asarray(score(*labels))
    order, plan = arrays[f"order_{batch}"], config["sampling"]
    found[f"text_{batch}"] = decode_loop.with_cache(step, plan, order, decode_loop.chooser(plan))
    if sample:
        order, num_diffusion = decode_loop.draw_orders(plan, 0, batch)
        text = sample(arrays[f"keys_{batch}"], np.float32(0), order, num_diffusion)
        found |= {f"sample_{batch}": np.asarray(text), f"sample_order_{batch}": order}
np.savez(made, **found)
