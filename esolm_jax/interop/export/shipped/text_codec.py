"""Prompts → token ids, and token ids → text, by vocabulary.json. Needs the standard library alone.

    codec = load(FOLDER)
    row = parse_prompt(codec, "once [MASK:3] a time", length=64)    # -1: to be generated
    text = codec.decode(ids)

The package that vocabulary.json names, if any, is used for prompts if it is installed.
"""

import codecs
import json
import pathlib
import sys

if __package__:
    from esolm_jax.data import known_text, mask_spans

    from . import spelling
else:
    import known_text
    import mask_spans
    import spelling

MASK = -1  # in a row: a token to be generated


def _each_bad_byte(error):
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("text_codec.each", _each_bad_byte)


def load(folder):
    """The codec of an exported folder."""
    folder = pathlib.Path(folder)
    return Codec(json.loads((folder / "vocabulary.json").read_text(encoding="utf-8")), folder)


class Codec:
    """The tokenizer of an exported folder.

    Attributes:
      kind: the kind of tokenizer. mask_id, bos_id, eos_id, pad_id: special ids.
      num_ids: the number of ids, the mask included.
      surfaces: spelling.Surfaces, or None: decoding is no concatenation, so that the tokenizer's
        own library is needed.
    """

    def __init__(self, vocabulary, folder="."):
        self.kind = vocabulary["kind"]
        roles = ("pad_id", "bos_id", "eos_id", "mask_id")
        self.pad_id, self.bos_id, self.eos_id, self.mask_id = (vocabulary[role] for role in roles)
        self.num_ids = max(vocabulary["vocab_size"], self.mask_id + 1)
        self.surfaces = None
        if vocabulary["inside"] is not None:
            self.surfaces = spelling.Surfaces(vocabulary)
            self._errors = "text_codec.each" if vocabulary["each_byte"] else "replace"
            self._encode = spelling.encoder(vocabulary, self.surfaces, pathlib.Path(folder))

    def decode(self, ids, *, bos_is_given=True):
        """Text of `ids`, without BOS and PAD, with EOS as [EOS] and the mask as [MASK].

        Args:
          bos_is_given: False if a BOS at the beginning was generated: no text begins after it.

        Raises:
          ValueError: id out of range, or a tokenizer without surfaces.
        """
        self._check_surfaces()
        # In this order, because PAD and BOS may be EOS.
        names = {self.pad_id: "", self.bos_id: "", self.eos_id: "[EOS]", self.mask_id: "[MASK]"}
        out, run, begins = [], [], True
        for n, i in enumerate(map(int, ids)):
            if not 0 <= i < self.num_ids:
                raise ValueError(f"token id {i} is not in 0..{self.num_ids - 1}")
            if i in names:
                out += [self._text(run, begins), names[i]]
                run, begins = [], n == 0 and i == self.bos_id and bos_is_given
            else:
                run.append(i)
        return "".join([*out, self._text(run, begins)])

    def _text(self, run, begins):
        return self.surfaces.data(run, begins).decode("utf-8", self._errors)

    def encode(self, text, *, begins=True):
        """Ids that decode to exactly this part of a text.

        Args:
          begins: the part is the beginning of the text; else other tokens precede it.

        Raises:
          known_text.NotKept: a ValueError: the tokenizer cannot spell a character.
          ValueError: a lone surrogate, or a tokenizer without surfaces.
        """
        self._check_surfaces()
        mask_spans.check_unicode(text)
        return self._encode(text, begins) if text else []

    def _check_surfaces(self):
        if self.surfaces is None:
            raise ValueError(f"the tokenizer ({self.kind}) needs its own library: use token ids")


def parse_prompt(codec, text, length):
    """The tokens of a text with [MASK] and [MASK:n] in it: list of ids, MASK where one is to be
    generated. A text without [MASK] is continued: MASKs follow, up to `length`.

    Raises:
      ValueError: more than `length` tokens, no token to generate, a character that the tokenizer
        cannot spell, or a bad [MASK:n].
    """
    try:
        mask_spans.check_unicode(text)
        return _row(codec, text, length)
    except ValueError as error:
        raise ValueError(f"prompt {ascii(text[:40])}: {error}") from error


def _row(codec, text, length):
    row, at, spans = [], 0, list(mask_spans.find(text))
    for start, stop, count in spans:
        row += _part(codec, text, at, start, not row)
        _check_length(len(row) + count, length)
        row += [MASK] * count
        at = stop
    row += _part(codec, text, at, len(text), not row)
    _check_length(len(row), length)
    row += [] if spans else [MASK] * (length - len(row))
    if MASK not in row:
        raise ValueError("must have at least one token to generate")
    return row


def _check_length(count, length):
    if count > length:
        raise ValueError(f"has {count} tokens or more: must have at most {length} (--length)")


def _part(codec, text, start, stop, begins):
    try:
        return codec.encode(text[start:stop], begins=begins)
    except known_text.NotKept as error:
        at = start + error.at
        raise ValueError(
            f"character {at}, {text[at]!r} (U+{ord(text[at]):04X}), must be kept as it is, but "
            f"the tokenizer ({codec.kind}) has no tokens for it there; "
            f"{mask_spans.advice(text, at)}"
        ) from error


def show(codec, rows, first_is_known, *, as_ids=False):
    """What the scripts print: texts, several of them under headings; or a JSON list per row.

    Args:
      rows: ids of each text.
      first_is_known: for each row, whether its first token is of the prompt.
      as_ids: JSON lists of ids; also for a tokenizer without surfaces, with a line on stderr.
    """
    if not as_ids and codec.surfaces is None:
        print(f"the tokenizer ({codec.kind}) needs its own library: printing ids", file=sys.stderr)
        as_ids = True
    if as_ids:
        return "\n".join(json.dumps(list(map(int, row))) for row in rows)
    texts = [
        codec.decode(row, bos_is_given=known)
        for row, known in zip(rows, first_is_known, strict=True)
    ]
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"--- text {n} {'-' * 60}\n{text}" for n, text in enumerate(texts))
