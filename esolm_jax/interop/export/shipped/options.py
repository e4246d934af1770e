"""The command line of run_numpy.py, run_onnx.py and run_stablehlo.py. Needs the standard library
alone.

An option that is not given is None: config.json of the folder decides.
"""

import argparse
import math
import sys

SETTINGS = ("alpha_0", "schedule", "steps", "temperature", "top_k", "top_p")
_EPILOG = """A prompt is continued; one with [MASK] or [MASK:n] is filled in. Without prompts, texts
from nothing. By default, config.json decides."""
_HELP = {
    "num_texts": "texts of each prompt (1)",
    "seed": "seed of the draws (0)",
    "length": "tokens of a text, prompt included",
    "alpha_0": "share of the tokens that the diffusion phase generates",
    "schedule": "ancestral, strided, shuffled_strided, left_to_right or blockwise",
    "steps": "steps of the diffusion phase; 0 = one token per step",
    "temperature": "0 = the most probable token",
    "top_k": "number of most probable tokens to draw from; 0 = all",
    "top_p": "probability mass of nucleus sampling; 1 = off",
}
# name → (type, whether a number is allowed, the allowed numbers)
_RULES = {
    "num_texts": (int, lambda x: x >= 1, "an integer of at least 1"),
    "seed": (int, lambda x: 0 <= x < 2**32, "an integer in [0, 2**32)"),
    "length": (int, lambda x: x >= 1, "an integer of at least 1"),
    "alpha_0": (float, lambda x: 0 <= x <= 1, "in [0, 1]"),
    "steps": (int, lambda x: x >= 0, "an integer of at least 0"),
    "temperature": (float, lambda x: 0 <= x < math.inf, "at least 0"),
    "top_k": (int, lambda x: x >= 0, "an integer of at least 0"),
    "top_p": (float, lambda x: 0 < x <= 1, "in (0, 1]"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def fail(message):
    """Ends the script with one line on stderr and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse(description, args=None):
    """The namespace of the command line: prompts, a list of texts; num_texts, seed, length,
    alpha_0, schedule, steps, temperature, top_k, top_p, ids. A bad option ends the script."""
    parser = _Parser(description=description, epilog=_EPILOG, allow_abbrev=False)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="a text")
    for name, about in _HELP.items():
        parser.add_argument(f"--{name}", metavar="X", help=about)
    parser.add_argument("--ids", action="store_true", help="print JSON lists of token ids")
    parser.set_defaults(num_texts="1", seed="0")
    given = parser.parse_intermixed_args(args)
    for name in _RULES:
        if (text := getattr(given, name)) is not None:
            setattr(given, name, _number(name, text))
    return given


def _number(name, text):
    kind, is_allowed, allowed = _RULES[name]
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not is_allowed(number):
        fail(f"--{name}={text}: must be {allowed}")
    return number


def settings(given):
    """The settings of sampling that were given, by name: some of SETTINGS."""
    named = {name: getattr(given, name) for name in SETTINGS}
    return {name: value for name, value in named.items() if value is not None}
