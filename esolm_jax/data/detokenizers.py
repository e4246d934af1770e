"""Detokenizers: the inverse of the tokenization that benchmark texts were published with.

Each is a list of rules, applied in order, once each, to the whole text. A rule is a literal string
or a regular expression, with its replacement. They reproduce the published evaluation, faults
included, because a perplexity is only comparable on the same text:

    wikitext   " N " becomes " 1 ", but only every second one of "N N N" (matches overlap);
               "/' 7/", slashes included, becomes "/'[0-9]/": a pattern used as its own replacement;
               quotes are paired from apostrophe to apostrophe, related or not.
    lm1b       " . " is joined only behind a word that itself follows a space.
    lambada    begins every text with a newline, the empty one, too.
"""

import re
from collections.abc import Callable

from esolm_jax.errors import UserError, nearest

_Rule = tuple[str | re.Pattern[str], str]

# Removes white space inside brackets, up to the next closing one; also inside pairs of quotes.
_TRIM_PAIRS: list[_Rule] = [
    (re.compile(rf"{opening}\s*([^{closing}]*?)\s*{closing}"), rf"{opening[-1]}\1{closing[-1]}")
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]"), ("{", "}"), ('"', '"'), ("'", "'"))
]
_WIKITEXT: list[_Rule] = [
    ("s '", "s'"),
    (re.compile("/' [0-9]/"), "/'[0-9]/"),
    *((f" @{sign}@ ", sign) for sign in "-,."),
    *((f" {sign} ", f"{sign} ") for sign in ":;.!?,"),
    *_TRIM_PAIRS,
    *((" ".join("=" * level), "=" * level) for level in (4, 3, 2)),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]
_PTB: list[_Rule] = [
    (" 's", "'s"),
    ("s ' ", "s' "),
    (" n't", "n't"),
    (" \n ", "\n"),
    (r"\/", "/"),
    *[(" N ", " 1 ")] * 10,  # the second time replaces what the first could not: "N N"
    ("$ 1", "$1"),
    ("# 1", "#1"),
    ("<unk>", "?"),
]
_LM1B: list[_Rule] = [
    ("http : / / ", "http://"),
    ("https : / / ", "https://"),
    (re.compile(r" '(\w+)"), r"'\1"),
    (re.compile(r" (\w+) \. "), r" \1. "),
    (re.compile(r" (\w+) \.$"), r" \1."),
    (" ? ", "? "),
    (re.compile(r" \?$"), "?"),
    (" ! ", "! "),
    (re.compile(r" !$"), "!"),
    *((f" {sign} ", f"{sign} ") for sign in ",:;"),
    (" / ", "/"),
    (re.compile('" ([^"]+) "'), r'"\1"'),
    (re.compile("' ([^']+) '"), r"'\1'"),
    (re.compile(r"\( ([^()]+) \)"), r"(\1)"),
    (re.compile(r"\[ ([^\[\]]+) \]"), r"[\1]"),
    ("$ ", "$"),
    ("£ ", "£"),
]


def _lambada(text: str) -> str:
    return "\n" + text.replace("“", '"').replace("”", '"').strip()


def _by(rules: list[_Rule]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        for pattern, replacement in rules:
            if isinstance(pattern, str):
                text = text.replace(pattern, replacement)
            else:
                text = pattern.sub(replacement, text)
        return text

    return apply


_DETOKENIZERS: dict[str, Callable[[str], str]] = {
    "ptb": _by(_PTB),
    "lm1b": _by(_LM1B),
    "lambada": _lambada,
}
_BY_PREFIX: dict[str, Callable[[str], str]] = {  # wikitext2, scientific_papers_arxiv, …
    "wikitext": _by(_WIKITEXT),
    "scientific_papers": _by(_WIKITEXT + _LM1B),
    "openwebtext": str,
    "text8": str,
    "ag_news": str,
    "none": str,
}


NAMES = ("none", "wikitext", "ptb", "lm1b", "lambada", "scientific_papers")


def detokenizer(name: str) -> Callable[[str], str]:
    """The detokenizer of a data set, by the data set's name in the published code.

    Names that begin with "wikitext" or "scientific_papers" (wikitext, then lm1b), and "ptb", "lm1b"
    and "lambada" have one. Texts of "openwebtext…", "text8…", "ag_news" and "none" are unchanged.

    Raises:
      UserError: an unknown name (the published code leaves the text unchanged).
    """
    if name in _DETOKENIZERS:
        return _DETOKENIZERS[name]
    for prefix, found in _BY_PREFIX.items():
        if name.startswith(prefix):
            return found
    names = (*_DETOKENIZERS, *_BY_PREFIX)
    raise UserError(
        f"dataset={name!r}: must be one of {', '.join(names)}{nearest(name, names)}; "
        "none leaves texts unchanged"
    )


def detokenize(name: str, text: str) -> str:
    """`text` of the data set `name`, as the published evaluation reads it; see `detokenizer`."""
    return detokenizer(name)(text)
