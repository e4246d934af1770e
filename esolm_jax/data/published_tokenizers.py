"""Tokenizers as the published evaluation uses them: special tokens that a text spells out
("<|endoftext|>", "[MASK]") become these tokens. Elsewhere in this package they are spelled."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esolm_jax.data import wordpieces
from esolm_jax.data.text8_tokenizer import KIND as TEXT8
from esolm_jax.data.text8_tokenizer import Text8

_SPECIALS = {
    "gpt2": ("<|endoftext|>", "[PAD]"),
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
}
EncodeBatch = Callable[[list[str]], list[list[int]]]


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

    encode_batch: EncodeBatch
    bos_id: int
    eos_id: int
    padding: Padding | None = None


def encoder(tokenizer: Any) -> EncodeBatch:
    """texts → ids of each, as published; of a tokenizer that no published run had, its own."""
    if isinstance(tokenizer, Text8):
        return lambda texts: list(map(tokenizer.encode_recognizing, texts))
    if tokenizer.kind not in _SPECIALS:
        return lambda texts: list(map(tokenizer.encode, texts))
    library = tokenizer.recognizing(_SPECIALS[tokenizer.kind])

    def encode_batch(texts: list[str]) -> list[list[int]]:
        encoded = library.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    return encode_batch


def read(given: str | Path) -> PublishedTokenizer:
    """The tokenizer in a folder: the files of GPT-2 or BERT; "text8" is the one of characters.

    In wrapped windows, BERT's BOS *and EOS* are [CLS], and [SEP] never occurs: the published code
    takes the first id of an encoded "[SEP]", and encoding puts [CLS] in front. GPT-2 has no padding
    token; the published code adds [PAD], which gets the id of the diffusion models' mask.

    Raises:
      UserError: no such files, or a tokenizer of another kind.
    """
    if given == TEXT8:
        return PublishedTokenizer(encoder(Text8()), Text8.bos_id, Text8.eos_id)
    found = wordpieces.read(given)
    is_bert = found.kind == "bert"
    pad_id = found.pad_id if is_bert else found.mask_id
    padding = Padding(found.bos_id, found.eos_id, pad_id)
    eos_id = found.bos_id if is_bert else found.eos_id
    return PublishedTokenizer(encoder(found), found.bos_id, eos_id, padding)
