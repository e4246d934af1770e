"""Every kind of tokenizer, as an exported folder holds it, and random texts, prompts and ids."""

import functools
import pathlib
import random

from benchmarks.reliability import infilling
from esolm_jax.data.text8_tokenizer import Text8
from esolm_jax.interop.export import vocabulary

KINDS = infilling.KINDS | {"text8": Text8}
LENGTH = 40  # of a row of a prompt


@functools.cache
def tokenizer_of(kind: str):
    return KINDS[kind]()


@functools.cache
def vocabulary_of(kind: str) -> dict:
    return vocabulary.content(tokenizer_of(kind))


def write(kind: str, folder: pathlib.Path) -> pathlib.Path:
    """vocabulary.json and the files of the tokenizer."""
    (folder / vocabulary.FOLDER).mkdir(parents=True)
    tokenizer_of(kind).save(folder / vocabulary.FOLDER)
    vocabulary.write(tokenizer_of(kind), folder)
    return folder


def texts(count: int) -> list[tuple[str, bool]]:
    """(text, whether it begins a text)."""
    rng = random.Random(0)
    return [(infilling.TEXTS[n % 3](rng), rng.random() < 0.5) for n in range(count)]


def masked_texts(count: int) -> list[str]:
    """Prompts: good ones, and of each kind of bad ones."""
    rng = random.Random(1)
    found = [
        "",
        "[MASK]",
        "a[MASK:40]",
        "a [MASK:41]",
        "to [MASK:0]",
        "to [MASK:x] be",
        "to [MASK:",
    ]
    found += [
        "[MASK:3] to be[MASK]",
        "a\n[MASK]\nb",
        "to be [MASK]",
        "é[MASK:007]🙂",
        "[MASK][MASK]",
    ]
    for n in range(count):
        parts = [infilling.TEXTS[n % 3](rng)[:12] for _ in range(rng.randint(1, 3))]
        found.append(f"[MASK:{rng.randint(1, 4)}]".join(parts))
    return found


def random_ids(num_ids: int, specials, count: int) -> list[tuple[list[int], bool]]:
    """(ids, whether a first BOS is given): also specials, and bytes that are no UTF-8."""
    rng = random.Random(2)
    kinds = [specials, range(num_ids), range(num_ids)]
    return [
        ([rng.choice(rng.choice(kinds)) for _ in range(rng.randint(0, 12))], rng.random() < 0.5)
        for _ in range(count)
    ]
