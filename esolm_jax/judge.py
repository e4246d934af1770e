"""python -m esolm_jax.judge --texts=FILE.jsonl --judge=FOLDER: quality of generated texts.

--judge=FOLDER         a GPT-2, Llama or Qwen of the Hugging Face hub, or a workdir of an `ar` model
--variant=per_text     generative perplexity: per_text, or pooled or bd3 as published
--references=FILE      texts to compare with, for MAUVE (approximate)
--metrics=A,B          by default all: generative_perplexity, entropy, distinct, repetition, mauve
--out=FILE.json        by default FILE.judge.json next to the texts

A line of FILE.jsonl is an object with `text` or `token_ids`, as `sample` writes it, a string, or a
list of the judge's ids. --config.mesh.… shards the judge. See docs/judge.md.
"""

import dataclasses
import pathlib

from absl import flags

import esolm_jax
from esolm_jax import cli, results
from esolm_jax import config as config_lib
from esolm_jax.errors import UserError
from esolm_jax.evaluation.protocol.judge import Judge
from esolm_jax.evaluation.quality import metrics, text_file
from esolm_jax.evaluation.quality.judged import VARIANTS, QualitySettings
from esolm_jax.parallel import distributed, multihost, sharding
from esolm_jax.process import jax_settings


def get_config():
    """The defaults, of which config.mesh and config.distributed are used."""
    return config_lib.default_config()


def define_flags() -> None:
    flags.DEFINE_string("texts", None, "JSONL of texts or token ids.")
    flags.DEFINE_string("judge", None, "A folder of the hub, or the workdir of an ar model.")
    flags.DEFINE_string("variant", "per_text", f"Perplexity: {', '.join(VARIANTS)}.")
    flags.DEFINE_string("references", None, "JSONL of texts to compare with, for MAUVE.")
    flags.DEFINE_string("features", None, "MAUVE's model: as --judge; by default the judge.")
    flags.DEFINE_integer("clusters", 0, "MAUVE's clusters; 0 = a tenth of the texts.")
    flags.DEFINE_string("metrics", "", f"Of {', '.join(metrics.names())}; '' = all.")
    flags.DEFINE_integer("max_length", 1024, "Tokens of a text that count.")
    flags.DEFINE_integer("batch_size", 0, "Rows of a forward pass; 0 = 8 per device.")
    flags.DEFINE_integer("published_batch_size", 8, "Texts of a batch of pooled and bd3.")
    flags.DEFINE_string("out", None, "The JSON file to write.")


def _needed(name: str) -> str:
    value = flags.FLAGS[name].value
    if not value:
        raise UserError(f"--{name} is missing: python -m esolm_jax.judge --texts=FILE --judge=DIR")
    return value


def _out(texts: str) -> pathlib.Path:
    if flags.FLAGS.out:
        return pathlib.Path(flags.FLAGS.out).expanduser()
    path = pathlib.Path(texts).expanduser()
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.judge.json")


def _settings() -> QualitySettings:
    """The settings of the flags, without what has to be read."""
    f = flags.FLAGS
    wanted = _wanted()
    metrics.check_names(wanted, has_references=bool(f.references))
    return QualitySettings(
        variant=f.variant,
        max_length=f.max_length,
        published_batch_size=f.published_batch_size,
        clusters=f.clusters,
    )


def _wanted() -> tuple[str, ...]:
    return tuple(name.strip() for name in flags.FLAGS.metrics.split(",") if name.strip())


def main(config, workdir: pathlib.Path | None) -> None:
    del workdir
    f, given, folder = flags.FLAGS, _needed("texts"), _needed("judge")
    settings, out = _settings(), _out(given)
    texts = text_file.read(given)
    references = text_file.read(f.references, "--references") if f.references else None
    for flag, read in (("--texts", texts), ("--references", references)):
        multihost.check_same_value(flag, [read.texts, read.token_ids] if read else None)
    results.check_can_write(out)
    mesh = sharding.make_mesh(config.mesh)
    model = Judge(folder, rows=f.batch_size, mesh=mesh)
    features = Judge(f.features, rows=f.batch_size, mesh=mesh) if f.features else None
    settings = dataclasses.replace(settings, references=references, features=features)
    figures = {
        "texts": given,
        "judge": folder,
        "features": f.features or folder,
        **metrics.judge(texts, model, settings, _wanted()),
        "devices": sharding.describe(mesh),
        "jax_settings": jax_settings.recorded(),
        "esolm_jax": esolm_jax.__version__,
    }
    if distributed.is_main():  # all processes have the same figures
        results.write_json(out, figures)
    for line in metrics.table(figures):
        print(line)
    print(f"wrote {out}")


CLI = cli.Verb(needs_workdir=False, define_flags=define_flags, default_config=lambda _: __file__)

if __name__ == "__main__":
    cli.run(main, CLI)
