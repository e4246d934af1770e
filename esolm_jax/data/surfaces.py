"""The surface of each token id: the UTF-8 bytes that it adds to a text.

Decoding is the concatenation of surfaces, so the surface of a token is independent of the tokens
around it. Only the first token of a text may differ: many tokenizers add a space in front of a
text, and decoding drops it again.
"""

import codecs
import dataclasses
import functools
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_TRIES, _LENGTH = 64, 6  # random runs to test concatenation on, and their length


def _each_bad_byte(error: UnicodeDecodeError) -> tuple[str, int]:
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("esolm_jax.each", _each_bad_byte)


@dataclasses.dataclass(frozen=True)
class Surfaces:
    """The surfaces of ids.

    Attributes:
      inside: by id, within a text. first: by id, at the beginning of a text.
      spells: by id, whether text may be spelled with it: not specials, nor the unknown token.
      each_byte: whether each invalid byte becomes one U+FFFD (SentencePiece, byte fallback), or
        each incomplete character (the Unicode recommendation).
    """

    inside: list[bytes]
    first: list[bytes]
    spells: list[bool]
    each_byte: bool

    @classmethod
    def of_bytes(cls, specials: int) -> Self:
        """256 ids that are their bytes, followed by the specials."""
        surfaces = [bytes([i]) for i in range(256)] + [b""] * specials
        return cls(surfaces, surfaces, [True] * 256 + [False] * specials, False)

    def data(self, run: Sequence[int], begins: bool) -> bytes:
        """The surface of a run of ids; `begins`: at the beginning of a text."""
        inside = self.inside
        if begins and run:
            return self.first[run[0]] + b"".join([inside[i] for i in run[1:]])
        return b"".join([inside[i] for i in run])

    def text(self, run: Sequence[int], begins: bool) -> str:
        errors = "esolm_jax.each" if self.each_byte else "replace"
        return self.data(run, begins).decode("utf-8", errors)

    def pieces(self, run: Sequence[int], begins: bool) -> list[str]:
        """The part of text(run) of each id; a character's is that of its last byte."""
        by_byte = self._by_byte(self.data(run, begins))
        out, at = [], 0
        for n, i in enumerate(run):
            end = at + len((self.first if begins and n == 0 else self.inside)[i])
            out.append("".join(by_byte[at:end]))
            at = end
        return out

    def _by_byte(self, data: bytes) -> list[str]:
        """The character that ends at each byte, or ''; U+FFFD for invalid bytes."""
        out: list[str] = []
        while len(out) < len(data):
            rest = data[len(out) :]
            try:
                text, bad = rest.decode(), 0
            except UnicodeDecodeError as error:
                text, bad = rest[: error.start].decode(), error.end - error.start
            for character in text:
                out += [""] * (len(character.encode()) - 1) + [character]
            if bad and self.each_byte:
                out += ["\ufffd"] * bad
            elif bad:
                out += [""] * (bad - 1) + ["\ufffd"]
        return out

    @functools.cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """Ids that spell, by their surface within a text; the last of equal ones, because byte
        tokens come first."""
        return {data: i for i, data in enumerate(self.inside) if data and self.spells[i]}

    @functools.cached_property
    def by_first_bytes(self) -> dict[bytes, int]:
        """The same at the beginning of a text; b'': the id of the space that is dropped there."""
        return {
            data: i
            for i, data in enumerate(self.first)
            if self.spells[i] and (data or self.inside[i] == b" ")
        }

    @functools.cached_property
    def longest(self) -> int:
        """The length in bytes of the longest token that spells."""
        return max(map(len, [*self.by_bytes, *self.by_first_bytes]), default=1)


def of_sentencepiece(model: Any) -> Surfaces | None:
    """None if decoding is not a concatenation."""
    size = model.vocab_size()
    pieces = model.id_to_piece(list(range(size)))
    first = model.decode([[i] for i in range(size)])
    inside: list[bytes] = []
    for i, piece in enumerate(pieces):
        if model.is_control(i):
            inside.append(b"")
        elif model.is_unknown(i):
            inside.append(first[i].encode())
        elif model.is_byte(i):
            inside.append(bytes([int(piece[3:5], 16)]))
        else:
            inside.append(piece.replace("\u2581", " ").encode())
    is_byte = [model.is_byte(i) for i in range(size)]
    spells = [
        not (model.is_control(i) or model.is_unknown(i) or model.is_unused(i)) for i in range(size)
    ]
    first = [inside[i] if is_byte[i] else text.encode() for i, text in enumerate(first)]
    whole = [i for i in range(size) if spells[i] and not is_byte[i]]
    anchor = next((i for i in whole if first[i].isalnum()), None)
    surfaces = Surfaces(inside, first, spells, each_byte=True)
    return surfaces if _concatenates(surfaces, anchor, whole, model.decode) else None


def of_tokenizers(tokenizer: Any, size: int, specials: Iterable[int]) -> Surfaces | None:
    """The surfaces of a tokenizer of the package `tokenizers`, for `size` ids; `specials` never
    spell. None if decoding is not a concatenation."""
    decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
    decode_all = functools.partial(tokenizer.decode_batch, skip_special_tokens=False)
    alone = decode_all([[i] for i in range(size)])
    spelled = {i: _BYTE.fullmatch(token) for token, i in tokenizer.get_vocab().items()}  # a byte
    words = (i for i, text in enumerate(alone) if text.isascii() and text.isalnum())
    anchor = next((i for i in words if not spelled.get(i)), None)
    if anchor is None:
        return None
    start = alone[anchor]
    after_anchor = decode_all([[anchor, i] for i in range(size)])
    if not all(text.startswith(start) for text in after_anchor):
        return None
    kinds = _decoders(tokenizer)
    inside = [text[len(start) :].encode() for text in after_anchor]
    first = [text.encode() for text in alone]
    is_byte = [False] * size
    for token, i in tokenizer.get_vocab(with_added_tokens=True).items():
        data = _bytes_of(token, kinds)
        if i < size and data is not None and data != inside[i]:
            if first[i] == inside[i]:
                first[i] = data
            inside[i], is_byte[i] = data, True
    if "ByteLevel" in kinds and _puts_a_space_first(tokenizer, inside):
        first = [data.removeprefix(b" ") for data in first]
    spells = [True] * size
    added = tokenizer.get_added_tokens_decoder().items()
    named = {i for i, token in added if token.special and not spelled.get(i)}
    for i in {*specials, *_unknown(tokenizer), *named}:
        if i is not None and i < size:
            spells[i] = False
    whole = [i for i in range(size) if spells[i] and not is_byte[i] and inside[i]]
    surfaces = Surfaces(inside, first, spells, each_byte="ByteFallback" in kinds)
    return surfaces if _concatenates(surfaces, anchor, whole, decode) else None


def _decoders(tokenizer: Any) -> set[str]:
    """The types of its decoders."""
    if tokenizer.decoder is None:
        return set()
    kinds: set[str] = set()
    nodes = [json.loads(tokenizer.decoder.__getstate__())]
    while nodes:
        node = nodes.pop()
        kinds.add(node.get("type"))
        nodes += node.get("decoders", [])
    return kinds


def _bytes_of(token: str, decoders: set[str]) -> bytes | None:
    """The bytes that a token spells according to the decoders."""
    if "ByteLevel" in decoders and all(c in BYTE_ALPHABET for c in token):
        return bytes(BYTE_ALPHABET[c] for c in token)
    if "ByteFallback" in decoders and (match := _BYTE.fullmatch(token)):
        return bytes([int(match[1], 16)])
    return None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's byte alphabet: the character for each byte in its tokens."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


BYTE_ALPHABET = _byte_alphabet()


def _puts_a_space_first(tokenizer: Any, inside: list[bytes]) -> bool:
    ids = tokenizer.encode("a", add_special_tokens=False).ids
    return b"".join(inside[i] for i in ids if i < len(inside)) == b" a"


def _unknown(tokenizer: Any) -> list[int]:
    model = tokenizer.model
    if type(model).__name__ == "Unigram":
        return [json.loads(model.__getstate__()).get("unk_id")]
    name = getattr(model, "unk_token", None)
    return [] if name is None else [tokenizer.token_to_id(name)]


def _concatenates(
    surfaces: Surfaces, anchor: int | None, ids: list[int], decode: Callable[[list[int]], str]
) -> bool:
    """Whether the library decodes random runs after the token `anchor` as `surfaces` predicts."""
    if anchor is None:
        return False
    rng = random.Random(0)
    runs = [[anchor, *rng.choices(ids, k=_LENGTH)] for _ in range(_TRIES)]
    return all(decode(run) == surfaces.text(run, True) for run in runs)
