"""Runs the artefacts of an export where esolm_jax cannot be imported, nor what they do not need.

python without_esolm_jax.py FOLDER RUNTIME IN.npz OUT.npz

IN holds labelled tokens and known tokens for batch sizes 1 and 5; OUT gets logits, and greedy texts
of one token per pass (and of the program `sample`, if the runtime has it).
"""

import functools
import json
import pathlib
import sys

FORBIDDEN = {
    "numpy": ("esolm_jax", "jax", "onnx", "onnxruntime", "safetensors", "ml_dtypes"),
    "onnx": ("esolm_jax", "jax", "onnx", "safetensors", "ml_dtypes"),
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
import schedule_esolm  # noqa: E402

config = json.loads((folder / "config.json").read_text())
sampling, sample = config["sampling"], None
if runtime == "numpy":
    bound = plain_transformer.read_safetensors(folder / "weights.safetensors"), config["network"]
    score = functools.partial(plain_transformer.score, *bound)
    step = functools.partial(plain_transformer.step, *bound)
elif runtime == "onnx":
    import run_onnx

    run, step = (run_onnx.load(folder / f"{part}.onnx") for part in ("score", "step"))
    score = lambda *labels: run(*labels)[0]  # noqa: E731
else:
    import run_stablehlo

    weights = run_stablehlo.load_weights(folder / "weights.safetensors")
    score, step, sample = (
        functools.partial(run_stablehlo.load(folder / f"{part}.stablehlo"), weights)
        for part in ("score", "step", "sample")
    )

found, arrays = {}, np.load(given)
one = {"temperature": 0.0, "schedule": "ancestral", "steps": 0}
for batch in (1, 5):
    labels = [arrays[f"{name}_{batch}"] for name in ("token", "position", "rank", "in_context")]
    found[f"logits_{batch}"] = np.asarray(score(*labels))
    rows = arrays[f"rows_{batch}"]
    keys = decode_loop.row_keys(0, batch)
    for name, settings in {"text": one, "sample": {"temperature": 0.0}}.items():
        s = schedule_esolm.checked(sampling, settings, rows.shape[1])
        passes = schedule_esolm.plan_passes(s, rows >= 0, 0)
        if name == "text":
            choose = decode_loop.chooser(s, keys)
            found[f"text_{batch}"] = decode_loop.run_passes(step, s, passes, rows, choose)
        elif sample:
            arguments = run_stablehlo.arguments(s, passes, rows, keys)
            found[f"sample_{batch}"] = np.asarray(sample(*arguments))
np.savez(made, **found)
