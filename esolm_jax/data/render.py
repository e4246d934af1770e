"""Ids → text, for all tokenizers."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from esolm_jax.data import surfaces
from esolm_jax.data.surfaces import Surfaces


def num_ids(tokenizer: Any) -> int:
    """The number of ids, with the mask, which is in the vocabulary or one past it."""
    return max(tokenizer.vocab_size, tokenizer.mask_id + 1)


def render(
    tokenizer: Any,
    ids: Iterable[int],
    parts_of: Callable[[list[int], bool], list[str]],
    bos_is_given: bool = True,
) -> list[str]:
    """Each special as one part, and the parts of each run of ids between specials; no BOS and PAD,
    but '[EOS]' and '[MASK]'. ValueError: id out of range.

    Args:
      parts_of: (run, whether the run begins the text) → its parts. A run begins the text at the
        first id, and after a BOS at the first id.
      bos_is_given: False: a run after a BOS does not begin the text.
    """
    shown = {  # in this order, because PAD and BOS may be EOS
        tokenizer.pad_id: "",
        tokenizer.bos_id: "",
        tokenizer.eos_id: "[EOS]",
        tokenizer.mask_id: "[MASK]",
    }
    out, run, begins, stop = [], [], True, num_ids(tokenizer)
    for n, i in enumerate(map(int, ids)):
        if not 0 <= i < stop:
            raise ValueError(f"token id {i} is not in 0..{stop - 1}")
        if i in shown:
            out += [*(parts_of(run, begins) if run else ()), shown[i]]
            run, begins = [], n == 0 and i == tokenizer.bos_id and bos_is_given
        else:
            run.append(i)
    return out + (parts_of(run, begins) if run else [])


def pieces_of(run: list[int], text_of: Callable[[list[int]], str]) -> list[str]:
    """The text that each id of a run adds; '' if the id does not complete a character."""
    pieces, so_far = [], ""
    for end in range(1, len(run) + 1):
        text = text_of(run[:end])
        if text.endswith("\ufffd") and end < len(run):
            text = so_far
        pieces.append(text[len(so_far) :])
        so_far = text
    return pieces


class Decodes:
    """Ids → text by `self.surfaces`, or by `self._library_text(run)` if they are None (the
    library's decoding is not a concatenation)."""

    surfaces: Surfaces | None
    eot_id: int | None = None  # the end of a turn in a chat, if the tokenizer has it

    def decode(self, ids: Iterable[int], *, bos_is_given: bool = True) -> str:
        """Text of `ids`. `bos_is_given`: False for a generated BOS: no text begins after it.
        ValueError: id out of range."""
        return "".join(render(self, ids, lambda *run: [self._text(*run)], bos_is_given))

    def pieces(self, ids: Iterable[int], *, bos_is_given: bool = True) -> list[str]:
        """The part of decode(ids) for each id; of several ids that spell one character, the last
        gets it and the others ''. ValueError: id out of range."""
        return render(self, ids, self._run_pieces, bos_is_given)

    def _text(self, run: list[int], begins: bool) -> str:
        if self.surfaces is None:
            return self._library_text(run)
        return self.surfaces.text(run, begins)

    def _run_pieces(self, run: list[int], begins: bool) -> list[str]:
        if self.surfaces is None:
            return pieces_of(run, self._library_text)
        return self.surfaces.pieces(run, begins)

    def _library_text(self, run: list[int]) -> str:
        raise NotImplementedError


class ByTokenizers(Decodes):
    """Text to ids and back by `self._tokenizer`, one of the package `tokenizers`."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without specials."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def recognizing(self, specials: Iterable[str] = ()) -> Any:
        """A copy of the library's tokenizer that finds special tokens in text, as `transformers`
        does: those of its own file, and `specials` (which get the next free ids if they are not in
        the vocabulary). It does not depend on this object."""
        copy = type(self._tokenizer).from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = False
        copy.add_special_tokens(list(specials))
        return copy

    @functools.cached_property
    def surfaces(self) -> Surfaces | None:
        specials = self.bos_id, self.eos_id, self.pad_id, self.mask_id
        return surfaces.of_tokenizers(self._tokenizer, self.vocab_size, specials)

    def _library_text(self, run: list[int]) -> str:
        return self._tokenizer.decode(run, skip_special_tokens=False)
