"""A workdir → a folder of artefacts that run without esolm_jax, each checked, and a manifest."""

import dataclasses
import hashlib
import importlib.resources
import importlib.util
import pathlib

import esolm_jax
from esolm_jax import results
from esolm_jax.errors import UserError
from esolm_jax.interop import memory, safetensors_file
from esolm_jax.interop.export import artefacts, parity, plain, sampling_plan
from esolm_jax.interop.export.artefacts import WEIGHTS, Source
from esolm_jax.interop.published import config as published_config
from esolm_jax.interop.published import names as published_names
from esolm_jax.interop.published import write as published_write
from esolm_jax.training import checkpoint_steps, restore

PARTS = ("score", "step", "sample")
PUBLISHED = "published.safetensors"
_NEEDS = {"safetensors": (), "stablehlo": ("flatbuffers",), "onnx": ("onnx", "onnxruntime")}
_SCRIPTS = {
    "safetensors": ("run_numpy.py",),
    "stablehlo": ("run_stablehlo.py",),
    "onnx": ("run_onnx.py",),
}
FORMATS = tuple(_NEEDS)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The requested export.

    Attributes:
      weights: "ema" or "raw".
      parts: the requested parts; () = all that the model has.
      tolerance: the largest allowed error of a logit.
      step: which checkpoint: a number, "best" or "latest".
    """

    weights: str = "ema"
    formats: tuple[str, ...] = FORMATS
    parts: tuple[str, ...] = ()
    tolerance: float = parity.TOLERANCE
    step: str = checkpoint_steps.LATEST

    def left_out(self, config) -> dict[str, str]:
        """Reasons for parts that are not exported. UserError if such a part was requested."""
        why = {"step": sampling_plan.no_step(config), "sample": sampling_plan.no_sampler(config)}
        if "stablehlo" not in self.formats:
            why["sample"] = "the sampler as one program is of the format stablehlo"
        why = {part: reason for part, reason in why.items() if reason}
        for part in self.parts:
            if part in why:
                raise UserError(f"--parts={part}: cannot be exported: {why[part]}")
        unasked = set(PARTS).difference(self.parts or PARTS)
        return why | dict.fromkeys(sorted(unasked - why.keys()), "not requested")

    def check_installed(self) -> None:
        """UserError if a package that a format needs is not installed."""
        for name in self.formats:
            for package in _NEEDS[name]:
                if importlib.util.find_spec(package) is None:
                    raise UserError(
                        f"--formats={','.join(self.formats)}: {name} needs {package}, which is not "
                        "installed: pip install -e '.[export]'"
                    )


def export(config, workdir: pathlib.Path, target: pathlib.Path, wanted: Wanted) -> dict:
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
        _write_scripts(draft, wanted)
        manifest = _manifest(source, about, entries, left_out)
        results.write_json(draft / "manifest.json", manifest)
    return manifest


def _copy_tokenizer(
    workdir: pathlib.Path, trained: restore.TrainedModel, folder: pathlib.Path
) -> None:
    """Copies the tokenizer. UserError unless it is the checkpoint's."""
    tokenizer = restore.load_tokenizer(workdir, trained.meta)
    folder.mkdir()
    tokenizer.save(folder)


def _write_weights(config, workdir, draft, wanted: Wanted, left_out: dict) -> tuple[Source, dict]:
    """Weights, configs and tokenizer. The parameters are freed when this returns."""
    trained = published_write.load(config, workdir, wanted.weights, wanted.step)
    _copy_tokenizer(workdir, trained, draft / "tokenizer")
    model, about = trained.built.model, published_write.about(trained, wanted.weights)
    shapes = plain.shapes(model, trained.params)
    batches = parity.examples(model, config.data.seq_len)
    source = Source(
        config=config,
        model=model,
        special=trained.built.special,
        plan=sampling_plan.make(
            config, trained, with_schedule=not sampling_plan.no_sampler(config)
        ),
        folder=draft,
        parts=tuple(part for part in PARTS if part not in left_out),
        shapes=shapes,
        batches=batches,
        logits=parity.trained_logits(model, trained.params, batches),
        tolerance=wanted.tolerance,
    )
    tensors = plain.tensors(model, trained.params)
    safetensors_file.write(draft / WEIGHTS, shapes, tensors, about)
    if "safetensors" in wanted.formats:
        if why := _no_published_names(config):
            left_out[PUBLISHED] = why
        else:
            published_write.write(draft / PUBLISHED, trained, wanted.weights)
            results.write_json(draft / "published.json", published_config.to_hyper(config))
    network = source.network | dataclasses.asdict(plain.in_float32(model))
    described = {"network": network, "sampling": source.plan.about} | about
    results.write_json(draft / "config.json", described)
    return source, about


def _no_published_names(config) -> str:
    """Why the published code has no such model, or ""."""
    try:
        published_names.check_config(config.model)
    except UserError as error:
        return str(error)
    return ""


def _write_artefacts(source: Source, wanted: Wanted) -> list[dict]:
    entries = []
    memory.clear_jit_caches_and_trim()  # frees the rest of the parameters
    with source.weights() as weights:
        greedy = parity.Greedy.of(source.texts(weights))
        if "stablehlo" in wanted.formats:
            entries += artefacts.of_stablehlo(source, greedy, weights)
    if "onnx" in wanted.formats:
        entries += artefacts.of_onnx(source, greedy)
    return artefacts.of_numpy(source, greedy) + entries


def _write_scripts(draft: pathlib.Path, wanted: Wanted) -> None:
    folder = importlib.resources.files("esolm_jax.interop.export.shipped")
    names = [name for format_ in wanted.formats for name in _SCRIPTS[format_]]
    for name in ("plain_transformer.py", "decode_loop.py", *names):
        (draft / name).write_bytes((folder / name).read_bytes())


def _manifest(source: Source, about: dict, entries: list[dict], left_out: dict) -> dict:
    tensors = {name: list(shape) for name, shape in source.shapes.items()}
    return {
        "esolm_jax": esolm_jax.__version__,
        "step": about["step"],
        "weights": about["weights"],
        "dtype": "float32",
        "objective": source.config.objective,
        "alpha_0": source.config.alpha_0,
        "vocab_size": source.model.vocab_size,
        "mask_id": source.special.mask,
        "tokenizer": about["tokenizer"],
        "sampling": source.plan.about,
        "logit_tolerance": source.tolerance,
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
