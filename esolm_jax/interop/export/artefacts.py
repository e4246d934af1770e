"""Makes, checks and describes the artefacts that compute something."""

import contextlib
import dataclasses
import functools
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
    weight_storage,
)
from esolm_jax.interop.export.parity import Limits, Reference
from esolm_jax.interop.export.shipped import decode_loop, plain_transformer, run_stablehlo
from esolm_jax.model.model_config import ModelConfig

WEIGHTS = "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model to export; its weights are in FOLDER/weights.safetensors.

    Attributes:
      plan: the section `sampling` of config.json.
      parts: some of "score", "step" and "sample".
      shapes: the shapes of the float32 weights, by plain name.
      dtype: the type of the stored weights.
      batches, logits: examples, and the trained model's logits of them.
    """

    config: object
    model: ModelConfig
    special: SpecialIds
    plan: dict
    folder: pathlib.Path
    parts: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    dtype: str
    batches: list[Tokens]
    logits: list[np.ndarray]
    limits: Limits

    @property
    def network(self) -> dict:
        return plain.description(self.model)

    def stored(self) -> weight_storage.Specs:
        """Shapes and dtypes of the stored weights by name."""
        return weight_storage.specs(self.shapes, self.dtype)

    def signature(self, part: str, cache_dtype: str) -> signatures.Signature:
        if part == "sample":
            return signatures.sample()
        if part == "step":
            return signatures.step(self.model, cache_dtype)
        return signatures.score(self.model)

    @contextlib.contextmanager
    def weights(self) -> Iterator[dict]:
        """The stored weights, as JAX arrays; callers must not keep them."""
        path, arrays = self.folder / WEIGHTS, {}
        for name, tensor in safetensors_file.entries(path).items():  # never in memory twice
            dtype = safetensors_file.STORED[tensor.dtype]
            count = (tensor.stop - tensor.start) // dtype.itemsize
            array = np.fromfile(path, dtype, count, offset=tensor.start)
            arrays[name] = jnp.asarray(array.reshape(tensor.shape))
        try:
            yield arrays
        finally:
            arrays.clear()
            memory.clear_jit_caches_and_trim()

    def reference(self) -> Reference:
        """Texts and distributions of the model, while the stored weights are float32."""
        is_rounded = self.dtype != "float32"
        with self.weights() as weights:
            network = plain.to_network(self.model, weights)
            texts = parity.Texts(self.config, self.special, network)
            reference = parity.make_reference(
                texts, self.plan, with_sampler="sample" in self.parts, is_rounded=is_rounded
            )
            del network, texts
        if not is_rounded:
            return reference
        arrays = plain_transformer.read_safetensors(self.folder / WEIGHTS)
        score = functools.partial(plain_transformer.score, arrays, self.network)
        measured = {"max_logit_error": parity.score_error(score, self.batches, self.logits)}
        limits = Limits(max(parity.TOLERANCE, self.limits.logit), 1.0)
        parity.require(f"{WEIGHTS} (float32)", measured, limits)
        step = functools.partial(plain_transformer.step, arrays, self.network)
        return reference.with_log_p(step if self.plan["has_step"] else score)


def _entry(
    source: Source,
    part: str,
    file: str,
    runtime: str,
    measured: dict,
    signature: signatures.Signature,
    suffix: str = "",
) -> dict:
    parity.require(f"{file} ({part})", measured, source.limits)
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


def _measure(source: Source, reference: Reference, part: str, function, cache_dtype: str) -> dict:
    """The parity of score or step, a function of NumPy arrays."""
    s, args = source.plan, (source.batches, source.logits)
    if part == "score":
        measured = {"max_logit_error": parity.score_error(function, *args)}
    else:
        error = parity.step_error(function, s["cache"], cache_dtype, *args)
        measured = {"max_logit_error": error}
    if s["has_step"] != (part == "step"):
        return measured
    agreement = [
        case.agreement(parity.generated(function, s, case, cache_dtype))
        for case in reference.greedy
    ]
    if reference.log_p is None:
        return measured | {"greedy_identical": min(agreement) == 1}
    measured |= parity.perplexity_figures(function, reference, cache_dtype)
    return measured | {"greedy_agreement": agreement[-1]}


def of_numpy(source: Source, reference: Reference) -> list[dict]:
    """The weights under plain names, as shipped/plain_transformer.py runs them."""
    weights, entries = plain_transformer.read_safetensors(source.folder / WEIGHTS), []
    for part in ("score", "step") if source.plan["has_step"] else ("score",):
        function = functools.partial(getattr(plain_transformer, part), weights, source.network)
        measured = _measure(source, reference, part, function, "float32")
        signature = source.signature(part, "float32")
        entry = _entry(source, part, WEIGHTS, "numpy", measured, signature)
        entries += [entry] if part in source.parts else []  # the weights are checked in any case
    return entries


def of_stablehlo(source: Source, reference: Reference, weights: dict) -> list[dict]:
    """<part>.stablehlo of every part."""
    makers, entries = stablehlo.functions(source.network), []
    makers["sample"] = exported_sampler.make(source.network, source.plan)
    specs = source.stored()
    cache_dtype = weight_storage.cache_dtype(source.dtype)
    platforms = "/".join(stablehlo.PLATFORMS)
    runtime = (
        f"jax {jax.__version__} (jax.export) for {platforms}; first input: the weights by name"
    )
    for part in source.parts:
        path = source.folder / f"{part}.stablehlo"
        signature = source.signature(part, cache_dtype)
        path.write_bytes(stablehlo.serialize(makers[part], signature, specs))
        run = functools.partial(run_stablehlo.load(path), weights)
        if part == "sample":
            measured = _measure_sampler(run, reference)
        else:
            measured = _measure(source, reference, part, run, cache_dtype)
        entries.append(_entry(source, part, path.name, runtime, measured, signature))
        memory.clear_jit_caches_and_trim()
    return entries


def _measure_sampler(sample, reference: Reference) -> dict:
    """Whether its texts equal ours, or the fraction of tokens for rounded weights."""
    measured: dict[str, bool | float] = {}
    for name, cases in reference.sampled.items():
        agreement = []
        for case in cases:
            settings, passes = case.plan(reference.s)
            keys = decode_loop.row_keys(case.seed, len(case.rows))
            arguments = run_stablehlo.arguments(settings, passes, case.rows, keys)
            agreement.append(case.agreement(sample(*arguments)))
        memory.clear_jit_caches_and_trim()
        if reference.drawn is None:
            measured[f"{name}_identical"] = min(agreement) == 1
        elif name == "greedy":
            measured["greedy_agreement"] = agreement[-1]
    return measured


def of_onnx(source: Source, reference: Reference) -> list[dict]:
    """<part>.onnx of score and step."""
    import onnxruntime

    from esolm_jax.interop.export import onnx_graph
    from esolm_jax.interop.export.shipped import run_onnx

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")  # no second copy of weights
    entries, runtime = [], f"onnxruntime {onnxruntime.__version__}, opset {onnx_graph.OPSET}"
    cache_dtype = weight_storage.onnx_cache_dtype(source.dtype)
    for part in source.parts:
        if part == "sample":
            continue
        path = source.folder / f"{part}.onnx"
        weights = source.folder / WEIGHTS
        signature = source.signature(part, cache_dtype)
        onnx_graph.save(onnx_graph.build(weights, source.network, signature), path)
        run = run_onnx.load(path, options)
        function = run if part == "step" else lambda *labels, run=run: run(*labels)[0]
        measured = _measure(source, reference, part, function, cache_dtype)
        entry = _entry(source, part, path.name, runtime, measured, signature, suffix="_out")
        entries.append(entry)
        del run, function
        memory.clear_jit_caches_and_trim()
    return entries
