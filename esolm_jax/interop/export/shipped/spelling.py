"""The tokens of known text, by vocabulary.json. Needs the standard library alone.

The surface of a token is the bytes that it adds to a text; a text is the concatenation of
surfaces. In vocabulary.json a string of bytes is a string of characters below 256.

`encoder` in vocabulary.json is how known text becomes the tokens of `sample --prompt`:

    characters   the adjacent pair that spells the token of the lowest id merges, until none does;
                 a character that is no token is spelled in bytes
    gpt2         the same with the bytes of a word in place of the characters
    library      `library` names a package and its file. Without the package, and in JavaScript:
                 the fewest tokens that spell the text
"""

import functools
import importlib
import itertools
import re
import sys
import unicodedata

if __package__:
    from esolm_jax.data import known_text
else:
    import known_text

NO_MERGE = NO_LIMIT = 2**31
SPACE = "\u2581"  # SentencePiece's symbol for a space
# GPT-2's words, by the classes of characters: L letter, N number, s white space, O other.
_SUFFIX = re.compile(r"'(?:[stmd]|re|ve|ll)")
_GPT2_WORD = re.compile(r" ?L+| ?N+| ?O+|[ s]+(?![^ s])|[ s]+")
_GPT2_SPACES = "\t\n\v\f\r\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
_GPT2_SPACES += "".join(map(chr, range(0x2000, 0x200B)))


class Surfaces:
    """The surfaces of vocabulary.json.

    Attributes:
      inside: by id, within a text. first: by id, at the beginning of a text.
      spells: by id, whether it may spell known text: not specials, nor the unknown token.
      by_bytes, by_first_bytes: ids that spell, by surface; the last of equal ones, because byte
        tokens come first. by_first_bytes[b""] is the space that is dropped at the beginning.
    """

    def __init__(self, vocabulary):
        inside = [_to_bytes(surface) for surface in vocabulary["inside"]]
        self.inside, self.first = inside, list(inside)
        if vocabulary["drops_first_space"]:
            self.first = [surface.removeprefix(b" ") for surface in inside]
        for i, surface in vocabulary["first"].items():
            self.first[int(i)] = _to_bytes(surface)
        self.spells = [True] * len(inside)
        for i in vocabulary["unspelled"]:
            self.spells[i] = False
        ids = [i for i, spells in enumerate(self.spells) if spells]
        self.by_bytes = {inside[i]: i for i in ids if inside[i]}
        self.by_first_bytes = {self.first[i]: i for i in ids if self.first[i] or inside[i] == b" "}
        self.longest = max(map(len, [*self.by_bytes, *self.by_first_bytes]), default=1)

    def data(self, run, begins):
        """The bytes of a run of ids; `begins`: at the beginning of a text."""
        surfaces = [self.inside[i] for i in run]
        if run and begins:
            surfaces[0] = self.first[run[0]]
        return b"".join(surfaces)


def encoder(vocabulary, surfaces, folder):
    """encode(text, begins) → ids, of vocabulary.json in this folder. See Codec.encode."""
    if vocabulary["encoder"] == "library":
        library = Library(vocabulary["library"], surfaces, folder)
        return lambda text, begins: known_text.encode(library, text, begins=begins, limit=NO_LIMIT)
    symbols = {_to_bytes(symbol): i for symbol, i in vocabulary["symbols"].items()}
    merges = Merges(surfaces.by_bytes | symbols, vocabulary["left"])
    if vocabulary["encoder"] == "gpt2":
        return lambda text, begins: merges.of_bytes(text)
    return lambda text, begins: merges.of_characters(text)


class Merges:
    """Byte-pair encoding in which the token of the lowest id comes first.

    ids: by surface. left: by id, the number of bytes of the left one of the two parts that merge to
    this token; None = two parts of any lengths.
    """

    def __init__(self, ids, left):
        self.ids, self.left = ids, left
        # Pairs of adjacent bytes within tokens: no merge joins two symbols at another pair.
        self.inner_pairs = {t[i : i + 2] for t in self.ids for i in range(len(t) - 1)}

    def of_characters(self, text):
        """Ids; a character that is no token is spelled in bytes. Raises NotKept."""
        ids, at = [], 0
        for chunk in self._chunks(map(str.encode, text)):
            for symbol in self._merged(chunk):
                spelled = [symbol] if symbol in self.ids else _single_bytes(symbol)
                if not all(part in self.ids for part in spelled):
                    raise known_text.NotKept(at, (symbol.decode(), ""))
                ids += [self.ids[part] for part in spelled]
                at += len(symbol.decode())
        return ids

    def of_bytes(self, text):
        """Ids; the pairs are of bytes within GPT-2's words."""
        words = (_single_bytes(word.encode()) for word in gpt2_words(text))
        return [self.ids[symbol] for word in words for symbol in self._merged(word)]

    def _chunks(self, symbols):
        """The symbols in chunks that do not merge with each other."""
        chunk = []
        for symbol in symbols:
            if chunk and chunk[-1][-1:] + symbol[:1] not in self.inner_pairs:
                yield chunk
                chunk = []
            chunk.append(symbol)
        if chunk:
            yield chunk

    def _rank(self, left, right):
        i = self.ids.get(left + right, NO_MERGE)
        if i != NO_MERGE and self.left is not None and self.left[i] != len(left):
            return NO_MERGE
        return i

    def _merged(self, symbols):
        """Merges the adjacent pair of the lowest rank, the leftmost of equal ones, until none is
        left."""
        symbols = list(symbols)
        ranks = [self._rank(*pair) for pair in itertools.pairwise(symbols)]
        while ranks and (lowest := min(ranks)) < NO_MERGE:
            at = ranks.index(lowest)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            del ranks[at]
            for i in range(max(0, at - 1), min(at + 1, len(ranks))):
                ranks[i] = self._rank(symbols[i], symbols[i + 1])
        return symbols


def gpt2_words(text):
    """GPT-2's division of a text; bytes merge within a word only."""
    classes, at = "".join(map(_class_of, text)), 0
    while at < len(text):
        stop = (_SUFFIX.match(text, at) or _GPT2_WORD.match(classes, at)).end()
        yield text[at:stop]
        at = stop


@functools.lru_cache(maxsize=4096)
def _class_of(character):
    if character == " ":
        return " "
    category = unicodedata.category(character)[0]
    return "s" if character in _GPT2_SPACES else category if category in "LN" else "O"


class Library:
    """The tokenizer of a library, as known_text.encode needs it; without the library, it finds no
    tokens, so that the fewest that spell a text are taken."""

    def __init__(self, library, surfaces, folder):
        self.package, self.file = library["package"], str(folder / library["file"])
        self.surfaces = surfaces

    def encode(self, text):
        return [] if self._tokens_of is None else self._tokens_of(text)

    def decode(self, ids):
        return self.surfaces.data(ids, True).decode("utf-8", "replace")

    @functools.cached_property
    def _tokens_of(self):
        """The library's function from text to ids; None: it is not installed."""
        try:
            package = importlib.import_module(self.package)
        except ImportError:
            print(
                f"the package {self.package} is not installed: prompts become the fewest tokens "
                "that spell them, which may differ from those of the training data",
                file=sys.stderr,
            )
            return None
        if self.package == "sentencepiece":
            return _of_sentencepiece(package.SentencePieceProcessor(model_file=self.file))
        tokenizer = package.Tokenizer.from_file(self.file)
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _of_sentencepiece(model):
    """text → ids; U+2581 itself is spelled in bytes, because it would decode to a space."""
    spelled = [model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
    has_bytes = model.unk_id() not in spelled

    def tokens_of(text):
        first, *rest = text.split(SPACE) if has_bytes else [text]
        ids = model.encode(first)
        for part in rest:
            ids += spelled + model.encode(part)
        return ids

    return tokens_of


def _single_bytes(data):
    return [bytes([byte]) for byte in data]


def _to_bytes(characters):
    """A string of bytes in vocabulary.json → bytes."""
    return characters.encode("latin-1")
