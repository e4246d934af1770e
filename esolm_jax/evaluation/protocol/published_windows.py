"""Windows of token ids as the published evaluation cuts them, bit for bit.

`prepare` makes them with config.data.window_mode=published; by default it drops nothing. How much
text these drop depends on the number of processes, so a published perplexity can only be compared
on windows made with the same `num_proc`.

Wrapped windows: documents are detokenized and tokenized, with EOS behind each if `insert_eos`; an
empty document is one, too. They are shared among `num_proc` processes in contiguous shards, the
first `documents % num_proc` of them one longer. Each shard is read in groups of 1000 documents: a
group is concatenated and cut, and *the rest of each group is dropped*. On a machine with many
processes a small data set loses much of its text, or all of it.

Padded windows: each document is a window of its own, between BOS and EOS, truncated to `block_size`
with its EOS. `insert_eos`, `insert_special_tokens` and `num_proc` have no effect.

text8: the text of a split is cut into documents of `block_size` characters, the last short one is
dropped, and these are wrapped. With the published defaults (EOS and specials, block size 256) a
window is BOS, 254 tokens and EOS, with another EOS every 256 characters; without both it is 256
characters. The train split of text8-crop has documents of 4 · block_size characters and windows of
2 · block_size tokens.

The published code fails (TypeError in `datasets`) if the first group of a process yields no window
and a later one does; here, the result is the windows of the later groups.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from esolm_jax.data import published_tokenizers
from esolm_jax.data import windows as windows_lib
from esolm_jax.data.detokenizers import detokenizer
from esolm_jax.data.published_tokenizers import PublishedTokenizer
from esolm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class WindowSettings:
    """How documents become windows. The defaults are those of the zero-shot table.

    Attributes:
      dataset: its published name, which decides the detokenizer; see `detokenize`.
      wrap: concatenate and cut documents; False: pad each.
      insert_eos: put EOS behind every document.
      insert_special_tokens: windows are BOS, block_size - 2 tokens and EOS.
      block_size: tokens of a window.
      num_proc: the number of processes of the published run; 1 for streamed data.
      split: "train" for the train split of text8-crop; others make no difference.
    """

    dataset: str
    wrap: bool = True
    insert_eos: bool = False
    insert_special_tokens: bool = True
    block_size: int = 1024
    num_proc: int = 1
    split: str | None = None

    def __post_init__(self) -> None:
        least = 3 if self.insert_special_tokens or not self.wrap else 1
        for name, lowest in (("block_size", least), ("num_proc", 1)):
            if getattr(self, name) < lowest:
                raise UserError(f"{name}={getattr(self, name)}: must be at least {lowest}")


def windows(
    documents: Iterable[str],
    tokenizer: str | Path,
    *,
    dataset: str,
    wrap: bool = True,
    insert_eos: bool = False,
    insert_special_tokens: bool = True,
    block_size: int = 1024,
    num_proc: int = 1,
    split: str | None = None,
) -> np.ndarray:
    """Token ids of the windows, int32 [n, block_size]; [0, block_size] if no window is full.

    See the module's description of the protocol, and `windows_with_mask` for padded windows.

    Args:
      documents: the texts, in order; for text8 one string (or its parts).
      tokenizer: a folder with the files of GPT-2's or BERT's tokenizer, or "text8"; see
        `published_tokenizers.read` for BERT's EOS and GPT-2's padding.
      dataset, …: see WindowSettings.

    Raises:
      UserError: an unknown data set or tokenizer, or a value that is out of range.
    """
    settings = WindowSettings(
        dataset, wrap, insert_eos, insert_special_tokens, block_size, num_proc, split
    )
    return windows_with_mask(documents, tokenizer, settings)[0]


def windows_with_mask(
    documents: Iterable[str], tokenizer: str | Path, settings: WindowSettings
) -> tuple[np.ndarray, np.ndarray]:
    """(windows, attention mask), int32 [n, block_size] each; otherwise as `windows`.

    The mask is 0 at padding and 1 elsewhere, so it is all ones if wrapped. Every position with mask
    1 is scored, BOS and EOS included, except the first one of an autoregressive model without a
    start token. The mask cannot be derived from the ids: a text may spell a padding token out.
    """
    clean, read = detokenizer(settings.dataset), published_tokenizers.read(tokenizer)
    if settings.dataset.startswith("text8"):
        documents, settings = _text8_documents(documents, settings)
    elif isinstance(documents, str):
        raise UserError("documents: must be several texts, not one string (only text8 is one)")
    texts = [clean(text) for text in documents]
    if not settings.wrap:
        return _padded(texts, read, settings.block_size)
    ids = _wrapped(texts, read, settings)
    return ids, np.ones_like(ids)


def _text8_documents(
    documents: Iterable[str], settings: WindowSettings
) -> tuple[list[str], WindowSettings]:
    """The documents of text8 and the settings of their windows."""
    characters, length = "".join(documents), settings.block_size
    if settings.dataset == "text8-crop" and settings.split == "train":
        # The published code doubles the block size twice: for the documents, once more than for
        # the windows.
        settings = dataclasses.replace(settings, block_size=2 * length)
        length *= 4
    starts = range(0, len(characters) - length + 1, length)
    return [characters[start : start + length] for start in starts], settings


def _wrapped(
    texts: list[str], tokenizer: PublishedTokenizer, settings: WindowSettings
) -> np.ndarray:
    """Wrapped windows."""
    specials = (tokenizer.bos_id, tokenizer.eos_id) if settings.insert_special_tokens else None
    end = [tokenizer.eos_id] if settings.insert_eos else []
    length = settings.block_size - (2 if specials else 0)
    sizes = windows_lib.group_sizes(len(texts), windows_lib.GROUP, settings.num_proc)
    documents = (document + end for document in tokenizer.encode_batch(texts))
    cut = windows_lib.surround(windows_lib.cut_groups(documents, length, sizes), specials)
    return np.array(list(cut), np.int32).reshape(-1, settings.block_size)


def _padded(
    texts: list[str], tokenizer: PublishedTokenizer, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """One window per text, and its mask."""
    padding = tokenizer.padding
    if padding is None:
        raise UserError("wrap=False: must be True with the text8 tokenizer (no published run pads)")
    ids = np.full((len(texts), block_size), padding.pad_id, np.int32)
    mask = np.zeros_like(ids)
    documents = windows_lib.pad(tokenizer.encode_batch(texts), block_size - 2, None)
    edges = padding.first_id, padding.last_id
    for row, window in enumerate(windows_lib.surround(documents, edges)):
        ids[row, : len(window)], mask[row, : len(window)] = window, 1
    return ids, mask
