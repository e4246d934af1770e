"""The slow tokenizer of Qwen 2, which Dream has, as a tokenizer.json."""

import json
import pathlib

from esolm_jax.data import hub_tokenizer
from esolm_jax.errors import UserError
from esolm_jax.files import regular_file

VOCAB, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"
# How Qwen 2 splits text before BPE.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read(folder: pathlib.Path) -> bytes:
    """The content of tokenizer.json, from vocab.json, merges.txt and added_tokens.json (which may
    be missing). UserError: a file is missing or damaged."""
    if not regular_file.is_there(folder / MERGES):
        raise UserError(f"{folder}: holds {VOCAB} without {MERGES}")
    lines = regular_file.read_text(folder / MERGES, hub_tokenizer.MAX_SIZE).split("\n")
    added = {}
    if regular_file.is_there(folder / ADDED):
        added = regular_file.read_json(folder / ADDED, hub_tokenizer.MAX_SIZE)
    if not isinstance(added, dict):
        raise UserError(f"{folder / ADDED}: damaged: must be an object of tokens and ids")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _QWEN_WORDS}, "behavior": "Isolated"}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": name, "special": True, **flags} for name, i in added.items()
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, byte_level | {"trim_offsets": True}],
        },
        "decoder": byte_level | {"trim_offsets": True},
        "model": {
            "type": "BPE",
            "vocab": regular_file.read_json(folder / VOCAB, hub_tokenizer.MAX_SIZE),
            "merges": [line for line in lines if line and not line.startswith("#version")],
        },
    }
    return json.dumps(content).encode()
