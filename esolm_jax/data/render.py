"""Ids → text, alike for all tokenizers."""

from collections.abc import Callable, Iterable
from typing import Any


def num_ids(tokenizer: Any) -> int:
    """How many ids there are with the mask, which may be one of the vocabulary or one past it."""
    return max(tokenizer.vocab_size, tokenizer.mask_id + 1)


def render(
    tokenizer: Any, ids: Iterable[int], parts_of: Callable[[list[int]], list[str]]
) -> list[str]:
    """Each special as one part, and the parts of each run of ids between specials; no BOS and PAD,
    but '[EOS]' and '[MASK]'. ValueError: id out of range."""
    shown = {  # in this order, because PAD and BOS may be EOS
        tokenizer.pad_id: "",
        tokenizer.bos_id: "",
        tokenizer.eos_id: "[EOS]",
        tokenizer.mask_id: "[MASK]",
    }
    out, run = [], []
    for i in map(int, ids):
        if not 0 <= i < num_ids(tokenizer):
            raise ValueError(f"token id {i} is not in 0..{num_ids(tokenizer) - 1}")
        if i in shown:
            out += [*(parts_of(run) if run else ()), shown[i]]
            run = []
        else:
            run.append(i)
    return out + (parts_of(run) if run else [])


def pieces_of(run: list[int], text_of: Callable[[list[int]], str]) -> list[str]:
    """What each id of a run adds to its text; '' if it does not complete a character."""
    found, so_far = [], ""
    for end in range(1, len(run) + 1):
        text = text_of(run[:end])
        if text.endswith("\ufffd") and end < len(run):
            text = so_far
        found.append(text[len(so_far) :])
        so_far = text
    return found


class ByTokenizers:
    """Text to ids and back by `self._tokenizer`, one of the package `tokenizers`."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without specials."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. ValueError: id out of range."""
        return "".join(render(self, ids, lambda run: [self._text(run)]))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The part of decode(ids) that each id stands for; of the ids that spell one character, the
        last stands for it and the others for ''. ValueError: id out of range."""
        return render(self, ids, lambda run: pieces_of(run, self._text))

    def _text(self, run: list[int]) -> str:
        return self._tokenizer.decode(run, skip_special_tokens=False)
