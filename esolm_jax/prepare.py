"""python -m esolm_jax.prepare --config=FILE --workdir=DIR: text → tokenizer → packed windows."""

import pathlib

from esolm_jax import cli
from esolm_jax.data import build
from esolm_jax.data.manifest import data_dir
from esolm_jax.data.reader import unigram_perplexity


def main(config, workdir: pathlib.Path) -> None:
    directory = data_dir(config, workdir)
    manifest = build.prepare(config, directory)
    for name, split in manifest.splits.items():
        line = (
            f"{name:>10}: {split['documents']:,} documents, {split['tokens']:,} tokens "
            f"({split['bytes'] / max(1, split['tokens']):.2f} bytes each), "
            f"{split['windows']:,} windows of {manifest.seq_len}"
        )
        if "train" in manifest.splits:
            line += f", unigram perplexity {unigram_perplexity(manifest, name):.1f}"
        print(line)
    for note in manifest.notes():
        print(f"note: {note}")
    print(f"wrote {directory}: windows, tokenizer and manifest.json")
    if "train" in manifest.splits:
        print(cli.next_command("train", workdir, keep=cli.CONFIG))
    else:
        model, data = pathlib.Path("MODEL"), f"--config.data.dir={directory}"
        print(cli.next_command("evaluate", model, data, keep=r"config\.data\..+"))


CLI = cli.Verb(one_process=True, others_wait=True)

if __name__ == "__main__":
    cli.run(main, CLI)
