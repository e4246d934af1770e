"""Fields of config.data that data prepared by earlier versions lack, and what those were made with.

These are also the defaults of the fields.
"""

import types
from typing import Any

BEFORE: types.MappingProxyType[str, Any] = types.MappingProxyType(
    {
        "files": "",
        "document": "piece",
        "separator": "",
        "keep_blank": False,
        "detokenizer": "none",
        "document_end": "eos",
        "window_specials": "none",
        "window_mode": "all",
        "window_group": 1000,
        "window_shards": 1,
        "tokenizer_ids": 0,
    }
)
OF_WINDOWS = (  # which windows the documents become
    "document",
    "separator",
    "keep_blank",
    "detokenizer",
    "document_end",
    "window_specials",
    "window_mode",
    "window_group",
    "window_shards",
)
