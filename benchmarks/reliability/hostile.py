"""Rows of the sections on hostile input, in the columns of all sections."""

import collections
import pathlib
from collections.abc import Iterable

from benchmarks.reliability.verbs import Row

# Outcome names of these sections -> verbs.OUTCOMES.
_WORDS = {
    "accepted": "identical",
    "ok": "identical",
    "exact": "identical",
    "clean": "clean error",
    "refused": "clean error",
    "one line": "clean error",
    "differs, noted": "fell back",
    "changed": "silent",
}


def _rows(found: Iterable[dict]) -> list[dict]:
    """From {"kind": …, outcome: count, …, "examples": […]}."""
    rows = []
    for each in found:
        row = Row(each["kind"])
        for word, count in each.items():
            outcome = _WORDS.get(word, word)
            if outcome in ("identical", "clean error", "silent", "traceback", "hang") and count:
                row.add(outcome, f"{word}: {count}", times=count)
        row.examples += each.get("examples", [])
        rows.append(row.to_json())
    return rows


def prompts(folder: pathlib.Path, quick: bool) -> list[dict]:
    from benchmarks.reliability import hostile_prompts

    return hostile_prompts.run(folder, 200 if quick else 2000)


def configs(folder: pathlib.Path, quick: bool) -> list[dict]:
    from benchmarks.reliability import configs as configs_lib

    return _rows(configs_lib.run())


def foreign(folder: pathlib.Path, quick: bool) -> list[dict]:
    from benchmarks.reliability import foreign as foreign_lib

    return _rows(foreign_lib.run(120 if quick else 400))


def infilling(folder: pathlib.Path, quick: bool) -> list[dict]:
    from benchmarks.reliability import infilling as infilling_lib

    return _rows(infilling_lib.run(50 if quick else 1000))


def settings(folder: pathlib.Path, quick: bool) -> list[dict]:
    """One row: each setting is one attempt."""
    from benchmarks.reliability import settings as settings_lib

    found = settings_lib.run(folder, "PRNG_IMPL" if quick else "")
    row = Row("settings of a user's environment", collections.Counter())
    for each in found:
        outcome = _WORDS.get(each["outcome"], each["outcome"])
        row.add(outcome, f"{each['setting']}: {each['said']}")
    return [row.to_json() | {"settings": found}]
