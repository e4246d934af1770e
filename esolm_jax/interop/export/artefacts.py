"""Makes, checks and describes the artefacts that compute something."""

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.family.labels import Tokens
from esolm_jax.family.phase import SpecialIds
from esolm_jax.interop import memory, safetensors_file
from esolm_jax.interop.export import (
    exported_sampler,
    parity,
    plain,
    sampling_plan,
    signatures,
    stablehlo,
)
from esolm_jax.interop.export.sampling_plan import Plan
from esolm_jax.interop.export.shipped import plain_transformer, run_stablehlo
from esolm_jax.model.model_config import ModelConfig

WEIGHTS = "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to export; its weights are in FOLDER/weights.safetensors.

    Attributes:
      parts: some of "score", "step" and "sample".
      shapes: the shapes of the weights, by plain name.
      batches, logits: examples, and the trained model's logits of them.
      tolerance: the largest allowed error of a logit.
    """

    config: object
    model: ModelConfig
    special: SpecialIds
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
        """The weights of the file, as JAX arrays; callers must not keep them."""
        path, arrays = self.folder / WEIGHTS, {}
        for name, (offset, shape) in safetensors_file.tensor_offsets(
            path
        ).items():  # never in memory twice
            array = np.fromfile(path, "<f4", math.prod(shape), offset=offset)
            arrays[name] = jnp.asarray(array.reshape(shape))
        try:
            yield arrays
        finally:
            arrays.clear()
            memory.clear_jit_caches_and_trim()

    def texts(self, weights: dict) -> parity.Texts:
        network = plain.to_network(self.model, weights)
        return parity.Texts(self.config, self.plan, self.special, network)


def _entry(source: Source, part: str, file: str, runtime: str, measured: dict, suffix="") -> dict:
    parity.require(f"{file} ({part})", measured, source.tolerance)
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
        "parity": {"batch_sizes": list(parity.BATCHES), **measured},
    }
    note = sampling_plan.step_note(source.config) if part == "step" else ""
    return entry | ({"note": note} if note else {})


def _measure(source: Source, greedy: parity.Greedy, part: str, function) -> dict:
    """The parity of score or step, a function of NumPy arrays."""
    about, args = source.plan.about, (source.batches, source.logits)
    if part == "score":
        measured = {"max_logit_error": parity.score_error(function, *args)}
    else:
        measured = {"max_logit_error": parity.step_error(function, about["cache"], *args)}
    if about["cached"] == (part == "step"):
        measured["greedy_identical"] = greedy.is_from(function)
    return measured


def of_numpy(source: Source, greedy: parity.Greedy) -> list[dict]:
    """The weights under plain names, as shipped/plain_transformer.py runs them."""
    weights, entries = plain_transformer.read_safetensors(source.folder / WEIGHTS), []
    for part in source.parts:
        if part == "sample":
            continue
        function = functools.partial(getattr(plain_transformer, part), weights, source.network)
        measured = _measure(source, greedy, part, function)
        entries.append(_entry(source, part, WEIGHTS, "numpy", measured))
    return entries


def of_stablehlo(source: Source, greedy: parity.Greedy, weights: dict) -> list[dict]:
    """<part>.stablehlo of every part."""
    makers, entries, s = stablehlo.functions(source.network), [], source.config.sample
    makers["sample"] = exported_sampler.make(
        source.network, source.plan, top_k=s.top_k, top_p=s.top_p
    )
    platforms = "/".join(stablehlo.PLATFORMS)
    runtime = (
        f"jax {jax.__version__} (jax.export) for {platforms}; first input: the weights by name"
    )
    for part in source.parts:
        path = source.folder / f"{part}.stablehlo"
        path.write_bytes(stablehlo.serialize(makers[part], source.signature(part), source.shapes))
        run = functools.partial(run_stablehlo.load(path), weights)
        if part == "sample":
            measured = parity.sampler_agrees(run, source.texts(weights))
        else:
            measured = _measure(source, greedy, part, run)
        entries.append(_entry(source, part, path.name, runtime, measured))
        memory.clear_jit_caches_and_trim()
    return entries


def of_onnx(source: Source, greedy: parity.Greedy) -> list[dict]:
    """<part>.onnx of score and step."""
    import onnxruntime

    from esolm_jax.interop.export import onnx_graph
    from esolm_jax.interop.export.shipped import run_onnx

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
        measured = _measure(source, greedy, part, function)
        entries.append(_entry(source, part, path.name, runtime, measured, suffix="_out"))
        del run, function
        memory.clear_jit_caches_and_trim()
    return entries
