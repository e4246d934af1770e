"""Prompts: text with [MASK] spans → token ids, from the command line, a text file or JSONL.

    once upon a time             is continued up to the length asked for
    once [MASK:3] a time[MASK]   three tokens and one are filled in, and nothing is added

A line of a .jsonl file is an object with `prompt` as above, or `text` and `rewrite`: spans
[start, stop) of its characters that are to be written anew, in as many tokens as they have now.
`seed` is optional: a row's own, in place of the run's. Any other file is one prompt.
"""

import dataclasses
import itertools
import json
import pathlib
import re

from esolm_jax.config import is_allowed
from esolm_jax.errors import UserError
from esolm_jax.sampling.canvas import MASK

_SPAN = re.compile(r"\[MASK(?::([^\]]*))?\]")
_COUNT = re.compile(r"0*[1-9]\d{0,5}")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is known of a text.

    Attributes:
      tokens: ids, MASK where one is to be generated.
      is_whole: nothing is to be added behind them.
      seed: of its own, or None.
      name: what messages call it.
    """

    tokens: tuple[int, ...]
    is_whole: bool
    seed: int | None
    name: str


def of_text(text: str, tokenizer, *, seed: int | None = None, name: str = "prompt") -> Prompt:
    """The tokens of a text with [MASK] and [MASK:n] in it."""
    _check_unicode(text, name)
    tokens, at, is_whole = [], 0, False
    for match in _SPAN.finditer(text):
        count = "1" if match[1] is None else match[1]
        if not _COUNT.fullmatch(count):
            raise UserError(
                f"{name}: {match[0]}: must be [MASK], or [MASK:n] of at least 1 token and at most "
                "999999"
            )
        tokens += [*_encode(text[at : match.start()], tokenizer), *[MASK] * int(count)]
        at, is_whole = match.end(), True
    tokens += _encode(text[at:], tokenizer)
    return Prompt(tuple(tokens), is_whole, seed, name)


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise UserError(f"{name}: is no Unicode text: {error}") from error


def _encode(text: str, tokenizer) -> list[int]:
    return list(tokenizer.encode(text)) if text else []


def of_rewrite(text: str, spans, tokenizer, *, seed=None, name="prompt") -> Prompt:
    """All of a text but these spans of its characters, which are to be generated anew."""
    _check_unicode(text, name)
    tokens, at = [], 0
    for start, stop in _ascending(spans, text, name):
        tokens += _encode(text[at:start], tokenizer)
        tokens += [MASK] * len(_encode(text[start:stop], tokenizer))
        at = stop
    tokens += _encode(text[at:], tokenizer)
    return Prompt(tuple(tokens), True, seed, name)


def _ascending(spans, text: str, name: str) -> list:
    """The spans in their order. UserError if they are not such, or overlap."""

    def check(span, least: int = 0) -> None:
        is_span = isinstance(span, list | tuple) and [type(at) for at in span] == [int, int]
        if not (is_span and least <= span[0] < span[1] <= len(text)):
            raise UserError(
                f"{name}: rewrite {span}: must be [start, stop] within the text's {len(text)} "
                "characters, not empty, and not overlap"
            )

    for span in spans:
        check(span)
    found = sorted(spans)
    for before, span in itertools.pairwise(found):
        check(span, before[1])
    return found


def of_file(path: pathlib.Path, tokenizer) -> list[Prompt]:
    """The prompts of a .jsonl file, or the one of any other file.

    Raises:
      UserError: it cannot be read, holds nothing, or a line is not as above.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={path}: cannot be read: {error}") from error
    # Not splitlines(): JSON's strings may hold what Unicode, too, calls the end of a line.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"--prompts={path}: holds no prompts")
    if path.suffix != ".jsonl":
        return [of_text(text, tokenizer, name=str(path))]
    return [_of_line(line, tokenizer, f"{path}:{n}") for n, line in lines]


_FIELDS = {"prompt": str, "text": str, "rewrite": list, "seed": int}


def _of_line(line: str, tokenizer, name: str) -> Prompt:
    try:
        fields = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not JSON: {error}") from error
    wanted = f"{name}: must be an object with `prompt`, or with `text` and `rewrite`"
    if not isinstance(fields, dict):
        raise UserError(wanted)
    for field, value in fields.items():
        if not isinstance(value, _FIELDS.get(field, ())) or isinstance(value, bool):
            allowed = ", ".join(f"{n} ({kind.__name__})" for n, kind in _FIELDS.items())
            raise UserError(f"{name}: {field}={value!r}: fields are {allowed}")
    seed = fields.pop("seed", None)
    if seed is not None and not is_allowed("sample.seed", seed):
        raise UserError(f"{name}: seed={seed}: must be in [0, 2**32)")
    if fields.keys() == {"prompt"}:
        return of_text(fields["prompt"], tokenizer, seed=seed, name=name)
    if fields.keys() != {"text", "rewrite"}:
        raise UserError(wanted)
    return of_rewrite(fields["text"], fields["rewrite"], tokenizer, seed=seed, name=name)


def _once(pairs: list) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field is there twice")
    return fields


def complete(prompt: Prompt, length: int) -> tuple[int, ...]:
    """The tokens of the text to be: masks added up to `length`, unless it is whole.

    Raises:
      UserError: it is longer, or leaves nothing to generate.
    """
    have = len(prompt.tokens)
    if have > length:
        raise UserError(
            f"{prompt.name}: {have} tokens are more than the canvas of {length} "
            "(config.sample.length, or config.data.seq_len)"
        )
    tokens = prompt.tokens if prompt.is_whole else prompt.tokens + (MASK,) * (length - have)
    if MASK not in tokens:
        raise UserError(f"{prompt.name}: nothing in it is to be generated")
    return tokens
