"""The config of a corpus of text, for tests."""

import ml_collections


def config(train, **data):
    """Bytes, windows of 16; `data`: other fields of config.data."""
    defaults = dict(
        source="text", train=str(train), validation="", test="", holdout=0.05, text_field="text",
        tfds_dir="", seq_len=16, packing="wrap", tokenizer="bytes", tokenizer_path="",
        vocab_size=300,
    )  # fmt: skip
    return ml_collections.ConfigDict({"seed": 0, "data": defaults | data})
