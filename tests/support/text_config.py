"""The config of a corpus of text, for tests."""

import grain
import ml_collections
import numpy as np

from esolm_jax.data.later_fields import BEFORE


def config(train, **data):
    """Bytes, windows of 16; `data`: other fields of config.data."""
    defaults = dict(
        source="text", train=str(train), validation="", test="", holdout=0.05, text_field="text",
        tfds_dir="", **BEFORE, seq_len=16, packing="wrap", tokenizer="bytes", tokenizer_path="",
        vocab_size=300,
    )  # fmt: skip
    return ml_collections.ConfigDict({"seed": 0, "data": defaults | data})


def prepared_windows(manifest, split):
    """The windows of prepared data, as lists of ids."""
    source = grain.sources.ArrayRecordDataSource(manifest.shard_paths(split))
    return [np.frombuffer(source[i], manifest.dtype).tolist() for i in range(len(source))]
