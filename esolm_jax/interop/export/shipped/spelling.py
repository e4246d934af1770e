"""Known text → token ids that decode to exactly this text. Needs the standard library alone.

The surface of a token is the bytes that it adds to a text; a text is the concatenation of
surfaces. Here and in vocabulary.json a string of bytes is a str of characters below 256.

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

NO_MERGE = 2**31
# Known text is encoded after one of these, so that a library adds no space in front of it.
ANCHORS = ("", "\ue000", "\n", ".", "a", "0")
WINDOW = 128  # characters to encode again after a difference
SPACE = "\u2581"  # SentencePiece's symbol for a space
_WORD = re.compile(r"\s{0,64}\S{0,64}")
# GPT-2's words, by the classes of characters: L letter, N number, s white space, O other.
_SUFFIX = re.compile(r"'(?:[stmd]|re|ve|ll)")
_GPT2_WORD = re.compile(r" ?L+| ?N+| ?O+|[ s]+(?![^ s])|[ s]+")
_GPT2_SPACES = "\t\n\v\f\r\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
_GPT2_SPACES += "".join(map(chr, range(0x2000, 0x200B)))


class NotKept(ValueError):
    """No tokens spell a character of a text; `at` is its index."""

    def __init__(self, at):
        super().__init__(f"character {at}: the tokenizer has no tokens for it")
        self.at = at


class Surfaces:
    """The surfaces of vocabulary.json.

    Attributes:
      inside: by id, within a text. first: by id, at the beginning of a text.
      unspelled: ids that never spell known text: specials, and the unknown token.
      by_bytes, by_first: ids that spell, by surface; the last of equal ones, because byte tokens
        come first. by_first[""] is the space that is dropped at the beginning.
    """

    def __init__(self, vocabulary):
        inside = vocabulary["inside"]
        self.inside, self.first = inside, list(inside)
        if vocabulary["drops_first_space"]:
            self.first = [surface.removeprefix(" ") for surface in inside]
        for i, surface in vocabulary["first"].items():
            self.first[int(i)] = surface
        self.unspelled = frozenset(vocabulary["unspelled"])
        ids = [i for i in range(len(inside)) if i not in self.unspelled]
        self.by_bytes = {inside[i]: i for i in ids if inside[i]}
        self.by_first = {self.first[i]: i for i in ids if self.first[i] or inside[i] == " "}
        self.longest = max(map(len, [*self.by_bytes, *self.by_first]), default=1)

    def data(self, run, begins):
        """The bytes of a run of ids; `begins`: at the beginning of a text."""
        surfaces = [self.inside[i] for i in run]
        if run and begins:
            surfaces[0] = self.first[run[0]]
        return "".join(surfaces)

    def shortest(self, text, start, stop, begins):
        """The fewest tokens that spell text[start:stop]. Raises NotKept."""
        data = to_bytes(text[start:stop])
        # For each byte: (number of tokens so far, the last token, its start).
        best = [None] * (len(data) + 1)
        if begins:
            for surface, i in self.by_first.items():
                if data.startswith(surface):
                    best[len(surface)] = 1, i, -1
        else:
            best[0] = 0, -1, -1
        for at in range(len(data)):
            if best[at] is None:
                continue
            count = best[at][0] + 1
            for end in range(at + 1, min(len(data), at + self.longest) + 1):
                i = self.by_bytes.get(data[at:end])
                if i is not None and (best[end] is None or best[end][0] > count):
                    best[end] = count, i, at
        if best[-1] is None:
            last = max((n for n, found in enumerate(best) if found is not None), default=0)
            raise NotKept(start + num_characters(data[: last + 1]) - 1)
        ids, at = [], len(data)
        while at >= 0 and best[at][0]:
            ids.append(best[at][1])
            at = best[at][2]
        return ids[::-1]


def encoder(vocabulary, surfaces, folder):
    """encode(text, begins) → ids, of vocabulary.json in this folder. See Codec.encode."""
    if vocabulary["encoder"] == "library":
        return Library(vocabulary["library"], surfaces, folder).encode
    merges = Merges(surfaces.by_bytes | vocabulary["symbols"], vocabulary["left"])
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
        for chunk in self._chunks(map(to_bytes, text)):
            for symbol in self._merged(chunk):
                spelled = [symbol] if symbol in self.ids else symbol
                if not all(part in self.ids for part in spelled):
                    raise NotKept(at)
                ids += [self.ids[part] for part in spelled]
                at += num_characters(symbol)
        return ids

    def of_bytes(self, text):
        """Ids; the pairs are of bytes within GPT-2's words."""
        words = map(to_bytes, gpt2_words(text))
        return [self.ids[symbol] for word in words for symbol in self._merged(word)]

    def _chunks(self, symbols):
        """The symbols in chunks that do not merge with each other."""
        chunk = []
        for symbol in symbols:
            if chunk and chunk[-1][-1] + symbol[0] not in self.inner_pairs:
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
    """The tokens of a library as far as they decode to the text, and the fewest tokens that spell
    the rest of a word; without the library, the fewest tokens."""

    def __init__(self, library, surfaces, folder):
        self.package, self.file = library["package"], str(folder / library["file"])
        self.surfaces = surfaces

    def encode(self, text, begins):
        window, ids, at = text, [], 0
        while True:
            more, count = self._matching(window, begins and not ids)
            ids, at = ids + more, at + count
            if count < len(window):  # the word after the last match
                stop = _WORD.match(text, at).end()
                ids, at = ids + self.surfaces.shortest(text, at, stop, begins and not ids), stop
            if at == len(text):
                return ids
            window = _cut(text[at : at + WINDOW + 1])

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

    def _matching(self, text, begins):
        """(tokens, number of characters) of the longest prefix whose encoding decodes to itself."""
        best, most, data = [], 0, to_bytes(text)
        if not text or self._tokens_of is None:
            return best, most
        for anchor in ANCHORS[:1] if begins else ANCHORS:
            head = self._tokens_of(anchor) if anchor else []
            ids = self._tokens_of(anchor + text)
            if ids[: len(head)] != head:
                continue
            ids, count = self._matched(ids[len(head) :], data, begins)
            if count > most:
                best, most = ids, count
            if most == len(data):
                break
        return best, num_characters(data[:most])

    def _matched(self, ids, data, begins):
        """The leading tokens of `ids` that spell a prefix of `data`, and its length in bytes; whole
        characters only."""
        s, at, kept = self.surfaces, 0, (0, 0)
        for n, i in enumerate(ids):
            surface = (s.first if begins and n == 0 else s.inside)[i]
            if i in s.unspelled or not data.startswith(surface, at):
                break
            at += len(surface)
            if at == len(data) or _starts_character(data[at]):
                kept = n + 1, at
        return ids[: kept[0]], kept[1]


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


def to_bytes(text):
    """UTF-8, each byte as a character below 256."""
    return text.encode().decode("latin-1")


def num_characters(data):
    return sum(map(_starts_character, data))


def _starts_character(byte):
    return ord(byte) & 0xC0 != 0x80


def _cut(window):
    """The window without its last word, if it is one character longer than WINDOW."""
    if len(window) <= WINDOW:
        return window
    end = max(window.rfind(" ", 1), window.rfind("\n", 1))
    return window[: end if end > 0 else WINDOW]
