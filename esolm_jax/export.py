"""A workdir → artefacts for other runtimes, each checked, with a manifest.

python -m esolm_jax.export --workdir=DIR --to=FOLDER

--weights=ema|raw                      the EMA or the raw weights (default: ema)
--step=N|best|latest                   which checkpoint (default: latest)
--formats=safetensors,stablehlo,onnx   some of them (default: all)
--parts=score,step,sample              some functions (default: all that the model has)
--dtype=float32                        of the weights: float32, bfloat16, float16 or int8
--tolerance=1e-4                       largest allowed error of a logit; wide models may need more.
                                       Unchecked by default unless the weights are float32
--perplexity_tolerance=0.01            largest allowed relative change of the perplexity of other
                                       weights
--compile_for=h100:1,v5e:2x2           compiles the StableHLO files for these devices, which need
                                       not exist

python -m esolm_jax.export --workdir=DIR --to=hub[:FOLDER]

A folder that `transformers` opens, by default DIR/hub: a Llama or Qwen for autoregressive models of
style "llama", else a model with its own PyTorch code. The flags --weights, --step and --dtype
(float32, bfloat16, float16; by default float32, or that of the folder that a plain model came from)
apply, and

--layout=auto|esolm|plain              plain: a Llama or Qwen; esolm: with PyTorch code
--shard_gb=5                           the largest size of a file with weights
"""

import functools
import pathlib

from absl import flags

from esolm_jax import cli
from esolm_jax.aot import artefacts as aot_artefacts
from esolm_jax.errors import UserError
from esolm_jax.family import registry
from esolm_jax.interop.export import folder as export_folder
from esolm_jax.interop.export import hub_folder, parity, rounding, weight_storage
from esolm_jax.interop.export.folder import Wanted
from esolm_jax.interop.published import write as published_write

HUB = "hub"  # --to=hub, --to=hub:FOLDER


def define_flags() -> None:
    flags.DEFINE_string("to", "", "The folder to write: new, or empty; or hub, or hub:FOLDER.")
    flags.DEFINE_string("layout", "auto", "With --to=hub: auto | esolm | plain.")
    flags.DEFINE_float("shard_gb", 5.0, "With --to=hub: the largest file of weights, in GB.")
    flags.DEFINE_string("weights", "ema", "ema | raw")
    flags.DEFINE_string("formats", "", "Of safetensors, stablehlo, onnx; all by default.")
    flags.DEFINE_float("tolerance", None, "Largest allowed error of a logit.")
    flags.DEFINE_string("dtype", "", f"Of the weights: {' | '.join(weight_storage.DTYPES)}")
    flags.DEFINE_float(
        "perplexity_tolerance",
        parity.PERPLEXITY_TOLERANCE,
        "Largest allowed relative change of the perplexity.",
    )
    flags.DEFINE_string("compile_for", "", "Devices to compile the StableHLO for: h100:1,v5e:2x2")
    flags.DEFINE_string("parts", "", "Of score, step, sample; by default all that the model has.")


def _listed(name: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """The flag's values. UserError: one is not allowed."""
    given = [part.strip() for part in flags.FLAGS[name].value.split(",") if part.strip()]
    for part in given:
        if part not in allowed:
            raise UserError(f"--{name}={part}: must be one of {', '.join(allowed)}")
    return tuple(part for part in allowed if part in given)


def main(config, workdir: pathlib.Path) -> None:
    f = flags.FLAGS
    if not f.to:
        raise UserError("--to is missing: the folder to write, new or empty")
    if f.weights not in published_write.WEIGHTS:
        raise UserError(
            f"--weights={f.weights}: must be one of {', '.join(published_write.WEIGHTS)}"
        )
    if registry.get(config.objective).predicts_next:
        raise UserError(
            f"config.objective={config.objective!r}: cannot be exported, because artefacts predict "
            "a token from its own row, and this family from the row before"
        )
    if f.to.partition(":")[0] == HUB:
        _to_hub(config, workdir)
        return
    wanted = _wanted()
    topologies = [name for name in f.compile_for.split(",") if name]
    if topologies and "stablehlo" not in wanted.formats:
        raise UserError(
            f"--compile_for={f.compile_for}: needs stablehlo in --formats, because only its files "
            "are compiled"
        )
    aot_artefacts.check(topologies)
    target = pathlib.Path(f.to).expanduser()
    compile_all = functools.partial(aot_artefacts.compile_all, topologies)
    manifest = export_folder.export(config, workdir, target, wanted, compile_all)
    which = "the EMA, not the raw weights" if f.weights == "ema" else "the RAW weights, not the EMA"
    print(f"exported: {which}, of step {manifest['step']:,}; adaLN is folded in")
    if wanted.dtype != "float32":
        print(f"weights are stored in {wanted.dtype}")
    elif config.model.dtype != "float32":
        print(f"trained in {config.model.dtype}; the artefacts compute in float32")
    for entry in manifest["artefacts"]:
        print(f"{entry['file']:>22} {entry['function']:>6}: {_measured(entry['parity'])}")
    for row in manifest["compiled"]:
        gib = row["hbm"]["total"] / 2**30
        print(f"{row['file']:>22} compiles for {row['topology']}: {gib:.3f} GiB")
    for part, reason in manifest["not_exported"].items():
        print(f"not exported: {part}: {reason}")
    print(f"wrote {target}, with manifest.json")
    for script in [name for name in _SCRIPTS if name in manifest["files"]][:1]:
        print(f"to sample from it: python {target}/{script} 'PROMPT' --temperature=0.8")


_SCRIPTS = ("run_numpy.py", "run_onnx.py", "run_stablehlo.py")


def _wanted() -> Wanted:
    """The flags. UserError: a wrong one."""
    f = flags.FLAGS
    dtype = f.dtype or "float32"
    if dtype not in weight_storage.DTYPES:
        raise UserError(f"--dtype={f.dtype}: must be one of {', '.join(weight_storage.DTYPES)}")
    for name in ("tolerance", "perplexity_tolerance"):
        if f[name].value is not None and not f[name].value > 0:
            raise UserError(f"--{name}={f[name].value}: must be above 0")
    return Wanted(
        weights=f.weights,
        formats=_listed("formats", export_folder.FORMATS) or export_folder.FORMATS,
        parts=_listed("parts", export_folder.PARTS),
        dtype=dtype,
        tolerance=f.tolerance,
        perplexity_tolerance=f.perplexity_tolerance,
        step=f.step,
    )


def _to_hub(config, workdir: pathlib.Path) -> None:
    f = flags.FLAGS
    if f.layout not in hub_folder.LAYOUTS:
        raise UserError(f"--layout={f.layout}: must be one of {', '.join(hub_folder.LAYOUTS)}")
    if not 0 < f.shard_gb < 1e6:
        raise UserError(f"--shard_gb={f.shard_gb}: must be above 0, in GB")
    for name in ("formats", "parts", "compile_for", "tolerance", "perplexity_tolerance"):
        if f[name].value != f[name].default:
            raise UserError(f"--{name}={f[name].value}: must be left out with --to=hub")
    given = f.to.partition(":")[2]
    target = pathlib.Path(given).expanduser() if given else workdir / HUB
    allowed = ("float32", *rounding.DTYPES)
    if f.dtype and f.dtype not in allowed:
        raise UserError(f"--dtype={f.dtype}: must be one of {', '.join(allowed)} with --to=hub")
    shard_bytes = max(1, int(f.shard_gb * 1e9))
    wanted = hub_folder.Wanted(f.weights, f.step, f.layout, shard_bytes, f.dtype)
    written = hub_folder.export(config, workdir, target, wanted)
    which = "the EMA" if f.weights == "ema" else "the RAW weights"
    print(f"exported: {which} of step {written.step:,}, {written.parameters:,} parameters")
    if written.rounding:
        print(f"rounded to {f.dtype}: {_measured(written.rounding)}")
    if written.layout == "plain":
        print("a plain Llama or Qwen: AutoModelForCausalLM, vLLM and llama.cpp load it")
    else:
        print("AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True) loads it")
        print(f"to compare it with this model: python {target}/check_esolm.py")
    print(f"wrote {target}")


def _measured(figures: dict) -> str:
    parts = []
    if "max_logit_error" in figures:
        parts.append(f"logits within {figures['max_logit_error']:.1e} of the trained model's")
    if "perplexity_change" in figures:
        parts.append(f"perplexity {100 * figures['perplexity_change']:+.3g} %")
    if "greedy_agreement" in figures:
        parts.append(f"{100 * figures['greedy_agreement']:.3g} % of greedy tokens equal")
    for name in ("greedy", "drawn", "prompted"):
        if f"{name}_identical" in figures:
            equal = "identical to" if figures[f"{name}_identical"] else "different from"
            parts.append(f"{name} texts {equal} those of `sample`")
    return ", ".join(parts)


CLI = cli.Verb(reads_checkpoint=True, one_process=True, define_flags=define_flags)

if __name__ == "__main__":
    cli.run(main, CLI)
