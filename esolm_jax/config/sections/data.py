"""Fields of config.data."""

from esolm_jax.config.checks import MAX_WORKERS, OneOf, at_least, count, inside, size
from esolm_jax.config.field import Field
from esolm_jax.data import detokenizers, pack, sources, text_documents, tokenizer, windows
from esolm_jax.data.later_fields import BEFORE

_FREE = {"may_change_on_resume": True}  # prepared data are compared by their manifest
_ELSE = "as for train; '' = the dataset's own, else held out of train."


def _later(name: str, doc: str, check=None, **options) -> Field:
    """A field that earlier configs and prepared data lack."""
    return Field(BEFORE[name], doc, check, before=BEFORE[name], **options)


DATA = {
    "source": Field("shakespeare", "Where text comes from.",
                    sources.SourceCheck()),
    "files": _later("files", "text: the files that `train` and train[FIRST:STOP] stand for in the "
                    "three fields below.", **_FREE),
    "train": Field("", "text: comma-separated files, folders, globs; tfds: a split; text8: the "
                   "file. A last [FIRST:STOP] selects documents, such as [:-100000].", **_FREE),
    "validation": Field("", f"Validation split: {_ELSE}", **_FREE),
    "test": Field("", f"Test split: {_ELSE}", **_FREE),
    "holdout": Field(0.05, "Fraction of train held out for each split that is missing.",
                     inside(0, 0.5)),
    "text_field": Field("text", "Name of the field with the text, in .jsonl, .parquet, .arrow and "
                        "TFDS."),
    "document": _later("document", "A document of a .txt: a piece of 2 to 64 KiB, the file, a line "
                       "(line_with_newline keeps its end), a paragraph (up to a blank line), or "
                       "what is between separators.", OneOf(text_documents.DOCUMENTS)),
    "separator": _later("separator", "Text between two documents; document=separator only."),
    "keep_blank": _later("keep_blank", "Whether blank documents are documents, too."),
    "detokenizer": _later("detokenizer", "Undoes the tokenization that a data set was published "
                          "with.", OneOf(detokenizers.NAMES)),
    "tfds_dir": Field("", "data_dir of TFDS; '' = its default."),
    "dir": Field("", "Folder of the prepared data; '' = WORKDIR/data.", **_FREE),
    "seq_len": Field(128, "Length L of a text, in tokens.", size(2)),
    "packing": Field("wrap", "wrap: documents are joined and cut; pad: one document per window.",
                     OneOf(windows.PACKINGS)),
    "document_end": _later("document_end", "Token behind each document.",
                           OneOf(pack.DOCUMENT_ENDS)),
    "window_specials": _later("window_specials", "Tokens around each window, which holds L - 2 "
                              "others then.", OneOf(pack.WINDOW_SPECIALS)),
    "window_mode": _later("window_mode", "all: every token is in a window; published: the rest of "
                          "each group of documents is dropped, and special tokens that a text "
                          "spells out are recognized.", OneOf(windows.MODES)),
    "window_group": _later("window_group", "Documents of a group; window_mode=published.",
                           count(1)),
    "window_shards": _later("window_shards", "Shards into which documents are divided before they "
                            "are grouped (the published num_proc); window_mode=published.",
                            count(1)),
    "tokenizer": Field("sentencepiece", "Kind of tokenizer.", OneOf(tokenizer.KINDS)),
    "tokenizer_path": Field("", "sentencepiece: a .model ('' = train one). gpt2, bert: a folder, "
                            "tokenizer.json, vocab.json next to merges.txt, or vocab.txt. "
                            "tokenizers: the folder that `convert` wrote."),
    "tokenizer_ids": _later("tokenizer_ids", "Number of ids that the files of gpt2 or bert must "
                            "have; 0 = any.", size(0)),
    "vocab_size": Field(1024, "Size of a SentencePiece model to be trained, without the mask "
                        "token.", size(8)),
    "workers": Field(0, "Grain worker processes; 0 = read in the training process.",
                     at_least(0, MAX_WORKERS), **_FREE),
}  # fmt: skip
