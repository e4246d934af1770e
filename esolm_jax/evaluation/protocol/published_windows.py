"""Windows of token ids as the published evaluation cuts them, bit for bit.

`prepare` cuts its own windows, from which nothing is dropped. These drop text, and how much depends
on the number of processes, so a published perplexity can only be compared on windows made with the
same `num_proc`.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.evaluation.protocol import published_tokenizers
from esolm_jax.evaluation.protocol.detokenizers import detokenizer
from esolm_jax.evaluation.protocol.published_tokenizers import PublishedTokenizer

GROUP = 1000  # documents that are concatenated, and whose rest is dropped


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

    The defaults are those of the zero-shot table. See `windows_with_mask` for which positions of
    padded windows (wrap=False) are text; of wrapped windows all are.

    Wrapped: documents are detokenized and tokenized, with EOS behind each if `insert_eos`; an empty
    document is one, too. They are shared among `num_proc` processes in contiguous shards, the first
    `documents % num_proc` of them one longer. Each shard is read in groups of 1000 documents: a
    group is concatenated and cut, and *the rest of each group is dropped*. On a machine with many
    processes a small data set loses much of its text, or all of it.

    Padded: each document is a window of its own, between BOS and EOS, truncated to `block_size`
    with its EOS. `insert_eos`, `insert_special_tokens` and `num_proc` have no effect.

    text8: `documents` is the text of the split; it is cut into documents of `block_size`
    characters, the last short one is dropped, and these are wrapped. With the published defaults
    (EOS and specials) a window is BOS, 254 tokens and EOS, with another EOS every 256 characters;
    without both it is 256 characters. The train split of text8-crop has documents of 4 · block_size
    and windows of 2 · block_size.

    The published code fails (TypeError in `datasets`) if the first group of a process yields no
    window and a later one does; this function returns the windows of the later groups.

    Args:
      documents: the texts, in order; for text8 one string.
      tokenizer: a folder with the files of GPT-2's or BERT's tokenizer, or "text8"; see
        `published_tokenizers.read` for BERT's EOS and GPT-2's padding.
      dataset: its published name, which decides the detokenizer; see `detokenize`.
      wrap: concatenate and cut documents; False: pad each.
      insert_eos: put EOS behind every document.
      insert_special_tokens: windows are BOS, block_size - 2 tokens and EOS.
      num_proc: the number of processes of the published run; 1 for streamed data.
      split: "train" for the train split of text8-crop; others make no difference.

    Raises:
      UserError: an unknown data set or tokenizer, or a value that is out of range.
    """
    ids, _ = windows_with_mask(
        documents,
        tokenizer,
        dataset=dataset,
        wrap=wrap,
        insert_eos=insert_eos,
        insert_special_tokens=insert_special_tokens,
        block_size=block_size,
        num_proc=num_proc,
        split=split,
    )
    return ids


def windows_with_mask(
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
) -> tuple[np.ndarray, np.ndarray]:
    """(windows, attention mask), int32 [n, block_size] each; arguments as of `windows`.

    The mask is 0 at padding and 1 elsewhere. Every position with mask 1 is scored, BOS and EOS
    included, except the first one of an autoregressive model without a start token. The mask cannot
    be derived from the ids: a text may spell a padding token out.
    """
    least = 3 if insert_special_tokens or not wrap else 1
    for name, value, lowest in (("block_size", block_size, least), ("num_proc", num_proc, 1)):
        if value < lowest:
            raise UserError(f"{name}={value}: must be at least {lowest}")
    clean, read = detokenizer(dataset), published_tokenizers.read(tokenizer)
    if dataset.startswith("text8"):
        documents, block_size = _text8_documents(documents, dataset, block_size, split)
    elif isinstance(documents, str):
        raise UserError("documents: must be several texts, not one string (only text8 is one)")
    texts = [clean(text) for text in documents]
    if not wrap:
        return _padded(texts, read, block_size)
    specials = (read.bos_id, read.eos_id) if insert_special_tokens else None
    end = [read.eos_id] if insert_eos else []
    shards = [
        _wrapped(shard, read, end=end, specials=specials, block_size=block_size)
        for shard in _shards(texts, num_proc)
    ]
    ids = np.concatenate([np.zeros((0, block_size), np.int32), *shards])
    return ids, np.ones_like(ids)


def _text8_documents(
    documents: Iterable[str], dataset: str, block_size: int, split: str | None
) -> tuple[list[str], int]:
    """Documents, and tokens of a window."""
    characters = "".join(documents)
    length = block_size
    if dataset == "text8-crop" and split == "train":  # doubled twice; the windows, once
        length, block_size = 4 * block_size, 2 * block_size
    starts = range(0, len(characters) - length + 1, length)
    return [characters[start : start + length] for start in starts], block_size


def _shards(texts: list[str], num_proc: int) -> Iterator[list[str]]:
    """Contiguous shards, the first ones one text longer."""
    num_shards = max(min(num_proc, len(texts)), 1)
    size, longer = divmod(len(texts), num_shards)
    rest = iter(texts)
    for i in range(num_shards):
        yield list(itertools.islice(rest, size + (i < longer)))


def _wrapped(
    texts: list[str],
    tokenizer: PublishedTokenizer,
    *,
    end: list[int],
    specials: tuple[int, int] | None,
    block_size: int,
) -> np.ndarray:
    """Windows of one shard. end: ids behind each document. specials: around each window."""
    length = block_size - (2 if specials else 0)
    found = [np.zeros((0, block_size), np.int32)]
    for start in range(0, len(texts), GROUP):
        documents = tokenizer.encode_batch(texts[start : start + GROUP])
        ids = np.array([i for document in documents for i in document + end], np.int32)
        ids = ids[: len(ids) - len(ids) % length].reshape(-1, length)
        if specials:
            bos, eos = (np.full((len(ids), 1), i, np.int32) for i in specials)
            ids = np.concatenate([bos, ids, eos], axis=1)
        found.append(ids)
    return np.concatenate(found)


def _padded(
    texts: list[str], tokenizer: PublishedTokenizer, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """One window per text, and its mask."""
    if tokenizer.pad_id is None:
        raise UserError("wrap=False: must be True with the text8 tokenizer (no published run pads)")
    ids = np.full((len(texts), block_size), tokenizer.pad_id, np.int32)
    mask = np.zeros_like(ids)
    for row, document in enumerate(tokenizer.encode_batch(texts)):
        document = [tokenizer.first_id, *document[: block_size - 2], tokenizer.last_id]
        ids[row, : len(document)], mask[row, : len(document)] = document, 1
    return ids, mask
