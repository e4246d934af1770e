"""The files of an export that compute something: made, checked, and described for the manifest."""

import contextlib
import dataclasses
import functools
import gc
import math
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.interop import (
    exported_sampler,
    parity,
    plain,
    safetensors_file,
    sampling_plan,
    signatures,
    stablehlo,
)
from esolm_jax.interop.sampling_plan import Plan
from esolm_jax.interop.shipped import plain_transformer, run_stablehlo
from esolm_jax.labels import Tokens
from esolm_jax.model import ModelConfig
from esolm_jax.objectives import Special

WEIGHTS = "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Source:
    """What is exported, less its weights, which lie in FOLDER/weights.safetensors.

    Attributes:
      parts: of score, step and sample.
      shapes: of the weights, by plain name.
      batches, logits: examples, and what the trained model gives for them.
      tolerance: of a logit.
    """

    config: object
    model: ModelConfig
    special: Special
    plan: Plan
    folder: pathlib.Path
    parts: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    batches: list[Tokens]
    logits: list[np.ndarray]
    tolerance: float

    @property
    def network(self) -> dict:
        return plain.description(self.model)

    def signature(self, part: str) -> signatures.Signature:
        if part == "sample":
            return signatures.sample(self.plan.about["length"])
        return {"score": signatures.score, "step": signatures.step}[part](self.model)

    @contextlib.contextmanager
    def weights(self) -> Iterator[dict]:
        """Those in the file, as arrays of JAX; nobody may keep them."""
        path, found = self.folder / WEIGHTS, {}
        for name, (offset, shape) in safetensors_file.places(path).items():  # never in memory twice
            array = np.fromfile(path, "<f4", math.prod(shape), offset=offset)
            found[name] = jnp.asarray(array.reshape(shape))
        try:
            yield found
        finally:
            found.clear()
            gc.collect()

    def texts(self, weights: dict) -> parity.Texts:
        network = plain.to_network(self.model, weights)
        return parity.Texts(self.config, self.plan, self.special, network)


def _entry(source: Source, part: str, file: str, runtime: str, found: dict, suffix="") -> dict:
    parity.require(f"{file} ({part})", found, source.tolerance)
    signature = source.signature(part)
    outputs = [array.to_json() for array in signature.outputs]
    inputs = {array.name for array in signature.inputs}
    for array in outputs:
        array["name"] += suffix if array["name"] in inputs else ""
    entry = {
        "file": file,
        "function": part,
        "runtime": runtime,
        "inputs": [array.to_json() for array in signature.inputs],
        "outputs": outputs,
        "parity": {"batch_sizes": list(parity.BATCHES), **found},
    }
    note = sampling_plan.step_note(source.config) if part == "step" else ""
    return entry | ({"note": note} if note else {})


def _check(source: Source, greedy: parity.Greedy, functions: dict) -> dict[str, dict]:
    """What was measured of score and step, by part. `functions`: of numpy arrays, by part."""
    found, about = {}, source.plan.about
    args = source.batches, source.logits
    if score := functions.get("score"):
        found["score"] = {"max_logit_error": parity.score_error(score, *args)}
        if not about["cached"]:
            found["score"]["greedy_identical"] = greedy.is_from(score)
    if step := functions.get("step"):
        found["step"] = {"max_logit_error": parity.step_error(step, about["cache"], *args)}
        if about["cached"]:
            found["step"]["greedy_identical"] = greedy.is_from(step)
    return found


def of_numpy(source: Source, greedy: parity.Greedy) -> list[dict]:
    """The weights under plain names, as shipped/plain_transformer.py runs them."""
    weights = plain_transformer.read_safetensors(source.folder / WEIGHTS)
    functions = {
        part: functools.partial(getattr(plain_transformer, part), weights, source.network)
        for part in source.parts
        if part != "sample"
    }
    found = _check(source, greedy, functions)
    return [_entry(source, part, WEIGHTS, "numpy", found[part]) for part in functions]


def of_stablehlo(source: Source, greedy: parity.Greedy, weights: dict) -> list[dict]:
    """<part>.stablehlo of every part."""
    makers, runs = stablehlo.functions(source.network), {}
    s = source.config.sample
    makers["sample"] = exported_sampler.make(
        source.network, source.plan, top_k=s.top_k, top_p=s.top_p
    )
    for part in source.parts:
        content = stablehlo.serialize(makers[part], source.signature(part), source.shapes)
        path = source.folder / f"{part}.stablehlo"
        path.write_bytes(content)
        runs[part] = functools.partial(run_stablehlo.load(path), weights)
    sample = runs.pop("sample", None)
    found = _check(source, greedy, runs)
    if sample:
        found["sample"] = parity.sampler_agrees(sample, source.texts(weights))
    platforms = "/".join(stablehlo.PLATFORMS)
    runtime = (
        f"jax {jax.__version__} (jax.export) for {platforms}; first input: the weights by name"
    )
    return [_entry(source, part, f"{part}.stablehlo", runtime, found[part]) for part in found]


def of_onnx(source: Source, greedy: parity.Greedy) -> list[dict]:
    """<part>.onnx of score and step."""
    import onnxruntime

    from esolm_jax.interop import onnx_graph
    from esolm_jax.interop.shipped import run_onnx

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")  # no second copy of weights
    entries, runtime = [], f"onnxruntime {onnxruntime.__version__}, opset {onnx_graph.OPSET}"
    for part in source.parts:
        if part == "sample":
            continue
        path = source.folder / f"{part}.onnx"
        weights = source.folder / WEIGHTS
        onnx_graph.save(onnx_graph.build(weights, source.network, source.signature(part)), path)
        run = run_onnx.load(path, options)
        function = run if part == "step" else lambda *labels, run=run: run(*labels)[0]
        found = _check(source, greedy, {part: function})
        entries.append(_entry(source, part, path.name, runtime, found[part], suffix="_out"))
        del run, function
    return entries
