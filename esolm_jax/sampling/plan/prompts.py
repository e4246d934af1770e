"""Prompts: text with [MASK] spans → token ids, from the command line, a text file or JSONL.

    once upon a time             is continued up to config.sample.length tokens
    once [MASK:3] a time[MASK]   three tokens and one are filled in, and nothing is added

A line of a .jsonl file is an object with `prompt` as above, or `text` and `rewrite`: spans
[start, stop) of its characters that are generated again, with the same number of tokens.
`seed` is optional and replaces the run's seed for this row. Any other file is one prompt.

Known characters are kept exactly: the tokens of each known part decode to it, independent of the
generated tokens. It is an error if the tokenizer has no such tokens (see data/known_text.py), or if
a prompt exceeds the canvas (checked before the canvas is allocated).
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable

import numpy as np

from esolm_jax.config import is_allowed
from esolm_jax.data import known_text, mask_spans
from esolm_jax.errors import UserError
from esolm_jax.files import regular_file
from esolm_jax.sampling.plan.canvas import MASK

MAX_BYTES, MAX_PROMPTS = 16 * regular_file.MB, 2**16  # of a file of prompts
MAX_TOKENS = 2**24  # in all prompts together


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The known tokens of a text.

    Attributes:
      tokens: ids, MASK where one is to be generated.
      is_whole: no masks are added at the end.
      seed: its own seed, or None.
      name: its name in messages.
    """

    tokens: tuple[int, ...]
    is_whole: bool
    seed: int | None
    name: str


def parse_text(
    text: str, tokenizer, *, seed: int | None = None, name: str = "prompt", length: int = MAX_TOKENS
) -> Prompt:
    """The tokens of a text with [MASK] and [MASK:n] in it, for a canvas of `length`."""
    _check_unicode(text, name)
    draft = _Draft(text, tokenizer, name, length)
    spans, total = [], 0
    try:
        for span in mask_spans.find(text):
            spans.append(span)
            total += span[2]
            draft.check(total)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    at = 0
    for start, stop, count in spans:
        draft.keep(at, start)
        draft.mask(count)
        at = stop
    draft.keep(at, len(text))
    return Prompt(tuple(draft.tokens), bool(spans), seed, name)


def _check_unicode(text: str, name: str) -> None:
    try:
        mask_spans.check_unicode(text)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


class _Draft:
    """Builds a prompt from known parts and masks, left to right."""

    def __init__(self, text: str, tokenizer, name: str, length: int):
        self.text, self.tokenizer, self.name, self.length = (
            text,
            tokenizer,
            name,
            min(length, MAX_TOKENS),
        )
        self.tokens: list[int] = []

    def check(self, more: int) -> None:
        """UserError unless the canvas has room for that many more tokens."""
        if len(self.tokens) + more > self.length:
            raise UserError(_too_long(self.name, self.length))

    def mask(self, count: int) -> None:
        self.check(count)
        self.tokens += [MASK] * count

    def keep(self, start: int, stop: int) -> None:
        """Adds the tokens of text[start:stop]. UserError: these cannot be kept exactly."""
        limit = self.length - len(self.tokens)
        part, begins = self.text[start:stop], not self.tokens
        try:
            self.tokens += known_text.encode(self.tokenizer, part, begins=begins, limit=limit)
        except known_text.TooLong as error:
            raise UserError(_too_long(self.name, self.length)) from error
        except known_text.NotKept as error:
            raise UserError(f"{self.name}: {self._changed(error, start)}") from error

    def _changed(self, error: known_text.NotKept, start: int) -> str:
        at, (around, becomes) = start + error.at, error.becomes
        character = self.text[at]
        return (
            f"character {at}, {character!r} (U+{ord(character):04X}), must be kept as it is, but "
            f"the tokenizer ({self.tokenizer.kind}) has no tokens for it there: of {around!r} it "
            f"would make {becomes!r}; {mask_spans.advice(self.text, at)}"
        )


def _too_long(name: str, length: int) -> str:
    return (
        f"{name}: has more tokens than the canvas of {length} "
        "(config.sample.length, or config.data.seq_len)"
    )


def parse_rewrite(
    text: str, spans, tokenizer, *, seed=None, name="prompt", length: int = MAX_TOKENS
) -> Prompt:
    """The text with these spans of characters masked, to be generated again; for a canvas of
    `length`."""
    _check_unicode(text, name)
    if len(spans) > length:
        raise UserError(_too_long(name, length))
    spans = _ascending(spans, text, name)
    counts = _tokens_now(text, spans, tokenizer, length)
    draft, at = _Draft(text, tokenizer, name, length), 0
    for (start, stop), count in zip(spans, counts, strict=True):
        draft.keep(at, start)
        draft.mask(count)
        at = stop
    draft.keep(at, len(text))
    return Prompt(tuple(draft.tokens), True, seed, name)


def _tokens_now(text: str, spans, tokenizer, length: int) -> list[int]:
    """The number of tokens for each span; spans without exact encoding count their own tokens."""
    if not spans:
        return []
    try:
        ids = known_text.encode(tokenizer, text, begins=True, limit=2 * length)
    except known_text.TooLong:
        return [length + 1] * len(spans)
    except known_text.NotKept:
        return [max(1, len(tokenizer.encode(text[start:stop]))) for start, stop in spans]
    tokens = known_text.spans(tokenizer, text, ids)
    first, last = np.array(tokens).T
    return [int(((first < stop) & (last > start)).sum()) for start, stop in spans]


def _ascending(spans, text: str, name: str) -> list:
    """The spans in ascending order. UserError if one is invalid or two overlap."""

    def check(span, least: int = 0) -> None:
        is_span = isinstance(span, list | tuple) and [type(at) for at in span] == [int, int]
        if not (is_span and least <= span[0] < span[1] <= len(text)):
            raise UserError(
                f"{name}: rewrite {str(span)[:80]}: must be [start, stop] within the text's "
                f"{len(text)} characters, not empty, and not overlap"
            )

    for span in spans:
        check(span)
    ordered = sorted(spans)
    for before, span in itertools.pairwise(ordered):
        check(span, before[1])
    return ordered


def parse_file(path: pathlib.Path, tokenizer, *, length: int = MAX_TOKENS) -> list[Prompt]:
    """The prompts of a .jsonl file, or the one of any other file, for a canvas of `length`.

    Raises:
      UserError: the file cannot be read, is not regular, too large or empty, or a line is
        invalid.
    """
    where = f"--prompts={path}"
    text = regular_file.read_text(regular_file.expand(path), MAX_BYTES, where)
    text = text.removeprefix("\ufeff")
    # Not splitlines(): strings of JSON may contain other line separators of Unicode.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{where}: holds no prompts")
    if path.suffix != ".jsonl":
        return [parse_text(text, tokenizer, name=str(path), length=length)]
    if len(lines) > MAX_PROMPTS:
        raise UserError(f"{where}: holds {len(lines):,} prompts; must be at most {MAX_PROMPTS:,}")
    return bounded(_of_line(line, tokenizer, f"{path}:{n}", length) for n, line in lines)


def bounded(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The prompts as a list. UserError as soon as they have more than MAX_TOKENS tokens."""
    kept, total = [], 0
    for prompt in prompts:
        kept.append(prompt)
        total += len(prompt.tokens)
        if total > MAX_TOKENS:
            raise UserError(
                f"{prompt.name}: the prompts up to this one have {total:,} tokens: must be at most "
                f"{MAX_TOKENS:,}"
            )
    return kept


_FIELDS = {"prompt": str, "text": str, "rewrite": list, "seed": int}


def _of_line(line: str, tokenizer, name: str, length: int) -> Prompt:
    fields = regular_file.parse_json(line, name)
    wanted = f"{name}: must be an object with `prompt`, or with `text` and `rewrite`"
    if not isinstance(fields, dict):
        raise UserError(wanted)
    for field, value in fields.items():
        if not isinstance(value, _FIELDS.get(field, ())) or isinstance(value, bool):
            allowed = ", ".join(f"{n} ({kind.__name__})" for n, kind in _FIELDS.items())
            shown = f"{field[:80]}={repr(value)[:80]}"
            raise UserError(f"{name}: {shown}: fields are {allowed}")
    seed = fields.pop("seed", None)
    if seed is not None and not is_allowed("sample.seed", seed):
        raise UserError(f"{name}: seed={str(seed)[:80]}: must be in [0, 2**32)")
    common = {"seed": seed, "name": name, "length": length}
    if fields.keys() == {"prompt"}:
        return parse_text(fields["prompt"], tokenizer, **common)
    if fields.keys() != {"text", "rewrite"}:
        raise UserError(wanted)
    return parse_rewrite(fields["text"], fields["rewrite"], tokenizer, **common)


def complete(prompt: Prompt, length: int) -> tuple[int, ...]:
    """The tokens of the text, with masks added up to `length` unless the prompt is whole.

    Raises:
      UserError: it is longer, or has no token to generate.
    """
    have = len(prompt.tokens)
    if have > length:
        raise UserError(_too_long(prompt.name, length))
    tokens = prompt.tokens if prompt.is_whole else prompt.tokens + (MASK,) * (length - have)
    if MASK not in tokens:
        raise UserError(f"{prompt.name}: must have at least one token to generate")
    return tokens
