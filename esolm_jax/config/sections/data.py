"""Fields of config.data."""

from esolm_jax.config.checks import MAX_WORKERS, OneOf, at_least, inside, size
from esolm_jax.config.field import Field
from esolm_jax.data import sources, tokenizer, windows

_FREE = {"may_change_on_resume": True}  # prepared data are compared by their manifest
_ELSE = "as for train; '' = the dataset's own, else held out of train."

DATA = {
    "source": Field("shakespeare", "Where text comes from.",
                    sources.SourceCheck()),
    "train": Field("", "text: comma-separated files, folders, globs; tfds: a split.", **_FREE),
    "validation": Field("", f"Validation split: {_ELSE}", **_FREE),
    "test": Field("", f"Test split: {_ELSE}", **_FREE),
    "holdout": Field(0.05, "Fraction of train held out for each split that is missing.",
                     inside(0, 0.5)),
    "text_field": Field("text", "Name of the field with the text, in .jsonl and TFDS."),
    "tfds_dir": Field("", "data_dir of TFDS; '' = its default."),
    "dir": Field("", "Folder of the prepared data; '' = WORKDIR/data.", **_FREE),
    "seq_len": Field(128, "Length L of a text, in tokens.", size(2)),
    "packing": Field("wrap", "wrap: documents joined by EOS; pad: one document per window.",
                     OneOf(windows.PACKINGS)),
    "tokenizer": Field("sentencepiece", "Kind of tokenizer.", OneOf(tokenizer.KINDS)),
    "tokenizer_path": Field("", "sentencepiece: a .model ('' = train one). gpt2, bert: a folder, "
                            "tokenizer.json, vocab.json next to merges.txt, or vocab.txt. "
                            "tokenizers: the folder that `convert` wrote."),
    "vocab_size": Field(1024, "Size of a SentencePiece model to be trained, without the mask "
                        "token.", size(8)),
    "workers": Field(0, "Grain worker processes; 0 = read in the training process.",
                     at_least(0, MAX_WORKERS), **_FREE),
}  # fmt: skip
