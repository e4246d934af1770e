"""Detects damage to prepared data: the manifest, its neighbouring files and the shards.

The manifest has the SHA-256 of its own content, of the tokenizer's files and of the unigram counts;
these are verified when data are loaded. The shards' records are verified by `record_problems`
(the verb verify) and, during reads, by the checksums of ArrayRecord. Data prepared at commit
947f88e have digests of the records only; their other files are checked for consistency.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from esolm_jax.errors import UserError
from esolm_jax.files.hashing import hash_file

DIGEST = "sha256"  # of the manifest without this entry
_PREPARE_AGAIN = "delete {} and prepare again"


def digest(entries: dict[str, Any]) -> str:
    """The digest of the entries of a manifest, in any order."""
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def hash_files(directory: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """The entry `files` of a manifest: name -> {size_bytes, sha256}."""
    hashed = {name: hash_file(directory / name) for name in sorted(names)}
    return {name: {"size_bytes": size, "sha256": sha} for name, (size, sha) in hashed.items()}


def check_files(directory: Path, files: dict[str, dict[str, Any]]) -> None:
    """UserError unless the files of the manifest's entry `files` are intact."""
    for name, entry in files.items():
        path = directory / name
        try:
            if not path.is_file():
                state = "is missing" if not path.exists() else "is not a file"
            elif hash_file(path) == (entry["size_bytes"], entry["sha256"]):
                continue
            else:
                state = "content differs from the prepared data"
        except OSError as error:
            state = f"cannot be read: {error.strerror}"
        raise UserError(f"{path}: is damaged: {state}; {_PREPARE_AGAIN.format(directory)}")


def read_counts(path: Path, vocab_size: int, tokens: int) -> np.ndarray:
    """Unigram counts: int64 [vocab_size]. UserError unless they sum to `tokens`."""
    problem = None
    try:
        if not path.is_file():
            problem = "is missing" if not path.exists() else "is not a file"
        else:
            counts = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, MemoryError) as error:
        problem = f"cannot be read ({type(error).__name__})"
    if problem is None:
        if not isinstance(counts, np.ndarray) or counts.dtype != np.int64:
            problem = "must hold 64-bit integers"
        elif counts.shape != (vocab_size,):
            problem = f"has shape {counts.shape}, not ({vocab_size},)"
        elif counts.min() < 0 or counts.sum() != tokens:
            problem = f"does not hold counts of {tokens:,} tokens"
        else:
            return counts
    raise UserError(f"{path}: is damaged: {problem}; {_PREPARE_AGAIN.format(path.parent)}")


def structure_problem(entries: dict[str, Any]) -> str | None:
    """A problem with a manifest's entries that shows without a digest, or None."""
    try:
        for name in ("source", "seq_len", "packing"):
            if entries["data"][name] != entries[name]:
                return f"{name} differs from data.{name}"
        if entries["dtype"] not in ("<u2", "<u4"):
            return "dtype is not that of token ids"
        tokenizer = entries["tokenizer"]
        size = tokenizer["vocab_size"]
        if not 0 < size < 2**31 or not isinstance(tokenizer["fingerprint"], str):
            return "the tokenizer's entry"
        for name in ("mask_id", "bos_id", "eos_id", "pad_id"):
            if not 0 <= tokenizer[name] <= size:
                return f"the tokenizer's {name}"
        for name, split in entries["splits"].items():
            if sum(shard["windows"] for shard in split["shards"]) != split["windows"]:
                return f"the windows of the {name} split"
            if not 0 <= split["tokens"] <= split["windows"] * entries["seq_len"]:
                return f"the tokens of the {name} split"
            if min(split["bytes"], split["documents"]) < 0 or len(split["sha256"]) != 64:
                return f"the {name} split"
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return repr(error)
    return None


def record_problems(manifest, splits: list[str]) -> Iterator[str]:
    """Reads every record of these splits; yields a line for each damaged split."""
    import grain  # takes 0.2 s

    for split in splits:
        entry, found, count = manifest.split(split), hashlib.sha256(), 0
        try:
            source = grain.sources.ArrayRecordDataSource(manifest.shard_paths(split))
            for start in range(0, len(source), 1024):
                for record in source.__getitems__(range(start, min(start + 1024, len(source)))):
                    found.update(record)
                    count += 1
        except Exception as error:  # ArrayRecord raises many types
            yield f"{manifest.directory}: the {split} split cannot be read: {type(error).__name__}"
            continue
        if count != entry["windows"] or found.hexdigest() != entry["sha256"]:
            yield f"{manifest.directory}: records of the {split} split differ from those prepared"
