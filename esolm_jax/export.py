"""A workdir → artefacts for other runtimes, each checked, with a manifest.

python -m esolm_jax.export --workdir=DIR --to=FOLDER

--weights=ema|raw                      the EMA or the raw weights (default: ema)
--step=N|best|latest                   which checkpoint (default: latest)
--formats=safetensors,stablehlo,onnx   some of them (default: all)
--parts=score,step,sample              some functions (default: all that the model has)
--tolerance=1e-4                       largest allowed error of a logit; wide models may need more
"""

import pathlib

from absl import flags

from esolm_jax import cli
from esolm_jax.errors import UserError
from esolm_jax.interop.export import folder as export_folder
from esolm_jax.interop.export import parity
from esolm_jax.interop.export.folder import Wanted
from esolm_jax.interop.published import write as published_write


def define_flags() -> None:
    flags.DEFINE_string("to", "", "The folder to write: new, or empty.")
    flags.DEFINE_string("weights", "ema", "ema | raw")
    flags.DEFINE_string("formats", "", "Of safetensors, stablehlo, onnx; all by default.")
    flags.DEFINE_float("tolerance", parity.TOLERANCE, "Largest allowed error of a logit.")
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
    if not f.tolerance > 0:
        raise UserError(f"--tolerance={f.tolerance}: must be above 0")
    formats = _listed("formats", export_folder.FORMATS) or export_folder.FORMATS
    wanted = Wanted(f.weights, formats, _listed("parts", export_folder.PARTS), f.tolerance, f.step)
    target = pathlib.Path(f.to).expanduser()
    manifest = export_folder.export(config, workdir, target, wanted)
    which = "the EMA, not the raw weights" if f.weights == "ema" else "the RAW weights, not the EMA"
    print(f"exported: {which}, of step {manifest['step']:,}; adaLN is folded in")
    if config.model.dtype != "float32":
        print(f"trained in {config.model.dtype}; the artefacts compute in float32")
    for entry in manifest["artefacts"]:
        print(f"{entry['file']:>22} {entry['function']:>6}: {_measured(entry['parity'])}")
    for part, reason in manifest["not_exported"].items():
        print(f"not exported: {part}: {reason}")
    print(f"wrote {target}, with manifest.json")


def _measured(figures: dict) -> str:
    parts = []
    if "max_logit_error" in figures:
        parts.append(f"logits within {figures['max_logit_error']:.1e} of the trained model's")
    for name, what in (("greedy_identical", "greedy"), ("sampled_identical", "drawn")):
        if name in figures:
            parts.append(
                f"{what} texts {'identical to' if figures[name] else 'different from'} those of "
                "`sample`"
            )
    return ", ".join(parts)


CLI = cli.Verb(reads_checkpoint=True, one_process=True, define_flags=define_flags)

if __name__ == "__main__":
    cli.run(main, CLI)
