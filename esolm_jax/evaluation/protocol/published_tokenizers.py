"""Tokenizers as the published evaluation uses them: GPT-2's, BERT's, and text8's characters.

They differ from those of `esolm_jax.data` in what a text may contain: special tokens that a text
spells out ("<|endoftext|>", "[MASK]") become these tokens.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from esolm_jax.data import wordpieces

TEXT8 = "text8"
_GPT2_SPECIALS = ("<|endoftext|>", "[PAD]")
_BERT_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# [RESERVED] has an id, but text cannot spell it.
_TEXT8_SPECIALS = "[CLS]", "[SEP]", "[BOS]", "[EOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]"


@dataclasses.dataclass(frozen=True)
class Padding:
    """The ids of padded windows: around each text, and behind it."""

    first_id: int
    last_id: int
    pad_id: int


@dataclasses.dataclass(frozen=True)
class PublishedTokenizer:
    """Texts → ids, and the special ids that windows are made with.

    Attributes:
      encode_batch: list of texts → ids of each, without specials around them.
      bos_id, eos_id: of wrapped windows.
      padding: of padded windows; None: no published run had them.
    """

    encode_batch: Callable[[list[str]], list[list[int]]]
    bos_id: int
    eos_id: int
    padding: Padding | None = None


def read(given: str | Path) -> PublishedTokenizer:
    """The tokenizer in a folder: the files of GPT-2 or BERT; "text8" is the one of characters.

    In wrapped windows, BERT's BOS *and EOS* are [CLS], and [SEP] never occurs: the published code
    takes the first id of an encoded "[SEP]", and encoding puts [CLS] in front. GPT-2 has no padding
    token; the published code adds [PAD], which gets the id of the diffusion models' mask.

    Raises:
      UserError: no such files, or a tokenizer of another kind.
    """
    if given == TEXT8:
        return PublishedTokenizer(_text8_batch, _TEXT8_IDS["[BOS]"], _TEXT8_IDS["[EOS]"])
    found = wordpieces.read(given)
    is_bert = found.kind == "bert"
    library = found.recognizing(_BERT_SPECIALS if is_bert else _GPT2_SPECIALS)

    def encode_batch(texts: list[str]) -> list[list[int]]:
        encoded = library.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    padding = Padding(found.bos_id, found.eos_id, library.token_to_id("[PAD]"))
    eos_id = found.bos_id if is_bert else found.eos_id
    return PublishedTokenizer(encode_batch, found.bos_id, eos_id, padding)


_TEXT8_IDS = {
    token: i for i, token in enumerate((*_TEXT8_SPECIALS, *"abcdefghijklmnopqrstuvwxyz", " "))
}
_SPELLED = [name for name in _TEXT8_SPECIALS if name != "[RESERVED]"]
_TEXT8_TOKEN = re.compile("|".join([*map(re.escape, _SPELLED), "."]), re.DOTALL)


def _text8_batch(texts: list[str]) -> list[list[int]]:
    unknown = _TEXT8_IDS["[UNK]"]
    return [
        [
            _TEXT8_IDS.get(token if len(token) > 1 else token.lower(), unknown)
            for token in _TEXT8_TOKEN.findall(text)
        ]
        for text in texts
    ]
