"""A workdir → a folder of artefacts that run without esolm_jax, each checked, and a manifest."""

import dataclasses
import hashlib
import importlib.resources
import importlib.util
import pathlib
from collections.abc import Callable

import esolm_jax
from esolm_jax import results
from esolm_jax.errors import UserError
from esolm_jax.interop import memory, safetensors_file
from esolm_jax.interop.export import (
    artefacts,
    parity,
    plain,
    sampling_plan,
    vocabulary,
    weight_storage,
)
from esolm_jax.interop.export.artefacts import WEIGHTS, Source
from esolm_jax.interop.export.parity import Limits
from esolm_jax.interop.published import config as published_config
from esolm_jax.interop.published import names as published_names
from esolm_jax.interop.published import write as published_write
from esolm_jax.training import checkpoint_steps, restore

PARTS = ("score", "step", "sample")
PUBLISHED = "published.safetensors"
_NEEDS = {"safetensors": (), "stablehlo": ("flatbuffers",), "onnx": ("onnx", "onnxruntime")}
_OF_ONNX = (
    "run_onnx.py",
    "run_onnx.mjs",
    "decode_loop.mjs",
    "draws.mjs",
    "schedule_esolm.mjs",
    "text_codec.mjs",
)
_OF_ALL_SCRIPTS = (
    "plain_transformer.py",
    "decode_loop.py",
    "schedule_esolm.py",
    "text_codec.py",
    "spelling.py",
    "options.py",
    "command.py",
)
_OF_DATA = ("known_text.py", "mask_spans.py")  # modules of esolm_jax/data that they share with it
FORMATS = tuple(_NEEDS)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The requested export.

    Attributes:
      weights: "ema" or "raw".
      parts: the requested parts; () = all that the model has.
      dtype: of the stored weights, one of weight_storage.DTYPES.
      tolerance: the largest allowed error of a logit; None: 1e-4 with float32, else unchecked.
      perplexity_tolerance: the largest allowed relative change of the perplexity.
      step: which checkpoint: a number, "best" or "latest".
    """

    weights: str = "ema"
    formats: tuple[str, ...] = FORMATS
    parts: tuple[str, ...] = ()
    dtype: str = "float32"
    tolerance: float | None = None
    perplexity_tolerance: float = parity.PERPLEXITY_TOLERANCE
    step: str = checkpoint_steps.LATEST

    def left_out(self, config) -> dict[str, str]:
        """Reasons for parts that are not exported. UserError if such a part was requested."""
        why = {"step": sampling_plan.no_step(config)}
        if "stablehlo" not in self.formats:
            why["sample"] = "the sampler as one program is of the format stablehlo"
        why = {part: reason for part, reason in why.items() if reason}
        for part in self.parts:
            if part in why:
                raise UserError(f"--parts={part}: cannot be exported: {why[part]}")
        unasked = set(PARTS).difference(self.parts or PARTS)
        return why | dict.fromkeys(sorted(unasked - why.keys()), "not requested")

    @property
    def limits(self) -> Limits:
        default = parity.TOLERANCE if self.dtype == "float32" else 0.0
        tolerance = default if self.tolerance is None else self.tolerance
        return Limits(tolerance, self.perplexity_tolerance)

    def check_installed(self) -> None:
        """UserError if a package that a format needs is not installed."""
        for name in self.formats:
            for package in _NEEDS[name]:
                if importlib.util.find_spec(package) is None:
                    raise UserError(
                        f"--formats={','.join(self.formats)}: {name} needs {package}, which is not "
                        "installed: pip install -e '.[export]'"
                    )


Compile = Callable[
    [Source, list[dict]], list[dict]
]  # (source, entries) → `compiled` of the manifest


def export(
    config,
    workdir: pathlib.Path,
    target: pathlib.Path,
    wanted: Wanted,
    compile_all: Compile = lambda source, entries: [],
) -> dict:
    """Writes `target`, which must be new or empty: all of it, or nothing. Returns the manifest.

    One set of weights is in memory at a time: the parameters, then the written tensors.

    Raises:
      UserError: no checkpoint, a tokenizer of another model, an unsupported part, or an
        artefact that differs from the model by more than the tolerance.
    """
    results.check_new_folder("--to", target)
    wanted.check_installed()
    left_out = wanted.left_out(config)
    with results.new_folder(target) as draft:
        source, about = _write_weights(config, workdir, draft, wanted, left_out)
        entries = _write_artefacts(source, wanted)
        _write_scripts(draft, "step" if source.plan["has_step"] else "score")
        manifest = _manifest(source, about, entries, left_out)
        manifest["compiled"] = compile_all(source, entries)
        results.write_json(draft / "manifest.json", manifest)
    return manifest


def _copy_tokenizer(
    workdir: pathlib.Path, trained: restore.TrainedModel, draft: pathlib.Path
) -> None:
    """Copies the tokenizer, and writes what scripts decode with. UserError unless it is the
    checkpoint's."""
    tokenizer = restore.load_tokenizer(workdir, trained.meta)
    (draft / "tokenizer").mkdir()
    tokenizer.save(draft / "tokenizer")
    vocabulary.write(tokenizer, draft)


def _write_weights(config, workdir, draft, wanted: Wanted, left_out: dict) -> tuple[Source, dict]:
    """Weights, configs and tokenizer. The parameters are freed when this returns."""
    trained = published_write.load(config, workdir, wanted.weights, wanted.step)
    _copy_tokenizer(workdir, trained, draft)
    model, about = trained.built.model, published_write.about(trained, wanted.weights)
    shapes = plain.shapes(model, trained.params)
    batches = parity.examples(model, config.data.seq_len)
    source = Source(
        config=config,
        model=model,
        special=trained.built.special,
        plan=sampling_plan.of_artefacts(
            config, model, trained.built.special, weight_storage.onnx_cache_dtype(wanted.dtype)
        ),
        folder=draft,
        parts=tuple(part for part in PARTS if part not in left_out),
        shapes=shapes,
        dtype=wanted.dtype,
        batches=batches,
        logits=parity.trained_logits(model, trained.params, batches),
        limits=wanted.limits,
    )
    tensors = plain.tensors(model, trained.params)
    safetensors_file.write(draft / WEIGHTS, shapes, tensors, about)
    if "safetensors" in wanted.formats:
        if why := _no_published_names(config, wanted.dtype):
            left_out[PUBLISHED] = why
        else:
            published_write.write(draft / PUBLISHED, trained, wanted.weights, wanted.dtype)
            results.write_json(draft / "published.json", published_config.to_hyper(config))
    network = source.network | dataclasses.asdict(plain.in_float32(model))
    described = {"network": network, "dtype": wanted.dtype, "sampling": source.plan} | about
    results.write_json(draft / "config.json", described)
    return source, about


def _no_published_names(config, dtype: str) -> str:
    """Why the published code has no such model, or ""."""
    if dtype == "int8":
        return "the published code has no int8 weights"
    try:
        published_names.check_config(config.model)
    except UserError as error:
        return str(error)
    return ""


def _write_artefacts(source: Source, wanted: Wanted) -> list[dict]:
    entries = []
    memory.clear_jit_caches_and_trim()  # frees the rest of the parameters
    reference = source.reference()
    if source.dtype != "float32":
        weight_storage.rewrite(source.folder / WEIGHTS, source.dtype)
    if "stablehlo" in wanted.formats:
        with source.weights() as weights:
            entries += artefacts.of_stablehlo(source, reference, weights)
    if "onnx" in wanted.formats:
        entries += artefacts.of_onnx(source, reference)
    return artefacts.of_numpy(source, reference) + entries


def _write_scripts(draft: pathlib.Path, generates: str) -> None:
    """Copies the scripts whose artefacts were written.

    Args:
      generates: the function that generates texts with ONNX: "step" or "score".
    """
    shipped = importlib.resources.files("esolm_jax.interop.export.shipped")
    data = importlib.resources.files("esolm_jax.data")
    needs = {
        "run_numpy.py": WEIGHTS,
        "run_stablehlo.py": "sample.stablehlo",
        **dict.fromkeys(_OF_ONNX, f"{generates}.onnx"),
    }
    scripts = [name for name, file in needs.items() if (draft / file).exists()]
    for folder, names in ((shipped, (*_OF_ALL_SCRIPTS, *scripts)), (data, _OF_DATA)):
        for name in names:
            (draft / name).write_bytes((folder / name).read_bytes())


def _manifest(source: Source, about: dict, entries: list[dict], left_out: dict) -> dict:
    tensors = {name: list(spec.shape) for name, spec in source.stored().items()}
    return {
        "esolm_jax": esolm_jax.__version__,
        "step": about["step"],
        "weights": about["weights"],
        "dtype": source.dtype,
        "objective": source.config.objective,
        "alpha_0": source.config.alpha_0,
        "vocab_size": source.model.vocab_size,
        "mask_id": source.special.mask,
        "tokenizer": about["tokenizer"],
        "sampling": source.plan,
        "logit_tolerance": source.limits.logit or None,
        "perplexity_tolerance": source.limits.perplexity,
        "artefacts": entries,
        "not_exported": left_out,
        "tensors": tensors,
        "files": {
            str(path.relative_to(source.folder)): _identity(path)
            for path in sorted(source.folder.rglob("*"))
            if path.is_file()
        },
    }


def _identity(path: pathlib.Path) -> dict:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
