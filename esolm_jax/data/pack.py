"""Documents → windows of token ids, as config.data says."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from esolm_jax.data import document_parts, published_tokenizers, sources, windows
from esolm_jax.data.tokenizer import Tokenizer
from esolm_jax.errors import UserError

DOCUMENT_ENDS = ("eos", "bos", "none")
WINDOW_SPECIALS = ("none", "bos_eos", "bos_bos")
CHECKED = 1000  # documents of a split whose tokens are decoded again


@dataclasses.dataclass
class Tally:
    """Counts of the documents of a split, while they are packed.

    Attributes:
      documents, num_bytes: the documents, and their UTF-8 bytes; of padded windows those in them.
      tokens: of the documents, with what ends them.
      checked, altered: of the first documents, how many were decoded again, and how many of these
        differ from their text.
    """

    documents: int = 0
    num_bytes: int = 0
    tokens: int = 0
    checked: int = 0
    altered: int = 0


@dataclasses.dataclass(frozen=True)
class Packer:
    """Packs the documents of a split.

    Attributes:
      length: tokens of a window without its specials.
      end: what ends each document: one id or none.
      specials: the ids around each window, or None.
      progress: called after each document.
    """

    config: Any
    tokenizer: Tokenizer
    length: int
    end: list[int]
    specials: tuple[int, int] | None
    tally: Tally
    progress: Callable[[], None]

    @classmethod
    def of(cls, config: Any, tokenizer: Tokenizer, tally: Tally, progress) -> "Packer":
        ids = {"bos": [tokenizer.bos_id], "eos": [tokenizer.eos_id], "none": []}
        specials = [ids[name] for name in config.data.window_specials.split("_")]
        around = None if not specials[0] else (specials[0][0], specials[1][0])
        length = config.data.seq_len - (2 if around else 0)
        end = ids[config.data.document_end]
        return cls(config, tokenizer, length, end, around, tally, progress)

    def windows(self, split: str) -> Iterator[list[int]]:
        """The windows of a split."""
        data, texts = self.config.data, sources.documents(self.config, split)
        if data.packing == "pad":
            eos_id = self.end[0] if self.end else None
            made = windows.pad(self._first_tokens(texts), self.length, eos_id)
        elif data.window_mode == "all":
            made = windows.cut(self._parts(texts), self.length)
        else:
            made = windows.cut_groups(self._whole(texts), self.length, self._group_sizes(split))
        return windows.surround(made, self.specials)

    def _group_sizes(self, split: str) -> Iterable[int]:
        """The groups of config.data.window_mode=published. Several shards: counts the documents."""
        data = self.config.data
        if data.window_shards == 1:
            return itertools.repeat(data.window_group)
        count = sum(1 for _ in sources.documents(self.config, split))
        return windows.group_sizes(count, data.window_group, data.window_shards)

    def _encode(self) -> Callable[[str], Iterator[list[int]]]:
        """text → its tokens, in parts; as published if config.data.window_mode is."""
        if self.config.data.window_mode == "all":
            return lambda text: document_parts.encode(self.tokenizer, text)
        encode = published_tokenizers.encoder(self.tokenizer)
        return lambda text: iter(encode([text]))

    def _parts(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """The tokens of all documents and what ends each, in parts."""
        encode = self._encode()
        for text in texts:
            count, tokens = 0, []
            for tokens in encode(text):
                count += len(tokens)
                yield tokens
            self._done(text, count + len(self.end), tokens if count == len(tokens) else None)
            yield self.end

    def _whole(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """The tokens of each document and what ends it."""
        encode = self._encode()
        for text in texts:
            (tokens,) = encode(text)
            self._done(text, len(tokens) + len(self.end), tokens)
            yield tokens + self.end

    def _first_tokens(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """The first tokens of each document, more than a window if it has them."""
        encode = self._encode()
        for text in texts:
            tokens: list[int] = []
            for part in encode(text):
                tokens += part
                if len(tokens) > self.length:
                    text = self.tokenizer.decode(tokens[: self.length])  # the text in the window
                    break
            whole = tokens if len(tokens) <= self.length else None
            self._done(text, min(len(tokens) + len(self.end), self.length), whole)
            yield tokens

    def _done(self, text: str, num_tokens: int, tokens: list[int] | None) -> None:
        """Counts a document; `tokens`: all of them, or None."""
        tally = self.tally
        tally.documents += 1
        tally.num_bytes += document_parts.num_bytes(text)
        tally.tokens += num_tokens
        if tokens is not None and tally.documents <= CHECKED:
            tally.checked += 1
            tally.altered += self.tokenizer.decode(tokens) != text
        self.progress()


def check(config: Any) -> None:
    """UserError unless the fields of config.data about documents and windows are consistent."""
    data = config.data
    if bool(data.separator) != (data.document == "separator"):
        must = "must not be ''" if data.document == "separator" else "must be ''"
        raise UserError(
            f"config.data.separator={data.separator!r}: {must}, because config.data.document is "
            f"{data.document}"
        )
    if data.window_specials != "none" and data.seq_len < 3:
        raise UserError(
            f"config.data.seq_len={data.seq_len}: must be at least 3, because "
            f"config.data.window_specials={data.window_specials} takes 2 tokens"
        )


def check_not_empty(config: Any, split: str, tally: Tally, num_windows: int) -> None:
    """UserError that says what was dropped and why, if a split has no windows."""
    if num_windows:
        return
    data = config.data
    if data.window_mode == "all":
        raise UserError(f"config.data.{split}: its {tally.documents:,} documents have no tokens")
    raise UserError(
        f"config.data.{split}: has no windows: all {tally.tokens:,} tokens of its "
        f"{tally.documents:,} documents are dropped, because config.data.window_mode=published "
        f"drops the rest of each group of {data.window_group:,} documents in each of "
        f"{data.window_shards:,} shards, and none has {data.seq_len} tokens; set "
        "config.data.window_mode=all, or fewer window_shards"
    )
