"""The manifest of prepared data: source, settings and content (manifest.json, next to the
shards)."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from esolm_jax import results
from esolm_jax.data import integrity, sources
from esolm_jax.data.later_fields import BEFORE, OF_WINDOWS
from esolm_jax.data.text8_tokenizer import Text8
from esolm_jax.data.tokenizer import Bytes, Tokenizer, load_tokenizer
from esolm_jax.errors import UserError, nearest

VERSION = 1
MANIFEST_FILE = "manifest.json"
UNIGRAM_FILE = "unigram.npy"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of `directory`.

    data: the fields of config.data that determine the content (see content_fields).
    tokenizer: kind, fingerprint, vocab_size, mask_id, bos_id, eos_id, pad_id.
    splits: name -> {documents, bytes (UTF-8, of the text in the windows), tokens (valid, in the
        windows), windows, sha256 (of all records, joined), shards: [{file, windows, size_bytes}]};
        later also dropped_tokens (of the documents, in no window) and
        decoded: {checked, altered} (documents that decode to another text, of those checked). Only
        the splits that were given, if train was not.
    files: name -> {size_bytes, sha256}, of the tokenizer and the unigram counts; empty in data
        that were prepared without digests.
    """

    directory: Path
    source: str
    source_hash: str
    data: dict[str, Any]
    tokenizer: dict[str, Any]
    seq_len: int
    packing: str
    dtype: str
    splits: dict[str, dict[str, Any]]
    version: int = VERSION
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer["vocab_size"]

    @property
    def mask_id(self) -> int:
        return self.tokenizer["mask_id"]

    @property
    def pad_id(self) -> int:
        return self.tokenizer["pad_id"]

    def split(self, name: str) -> dict[str, Any]:
        """The entry of one split. Raises UserError if there is no such split."""
        if name not in self.splits:
            raise UserError(
                f"split {name!r}: must be one of {', '.join(self.splits)}, the splits that "
                f"{self.directory} holds{nearest(name, self.splits)}"
            )
        return self.splits[name]

    def shard_paths(self, split: str) -> list[str]:
        return [str(self.directory / shard["file"]) for shard in self.split(split)["shards"]]

    def unigram_counts(self) -> np.ndarray:
        """The count of each token in the train split: int64 [vocab_size]."""
        tokens = self.split("train")["tokens"]
        return integrity.read_counts(self.directory / UNIGRAM_FILE, self.vocab_size, tokens)

    def notes(self) -> list[str]:
        """Lines on tokens in no window, and on documents that their tokens do not spell."""
        lines = []
        for name, split in self.splits.items():
            if dropped := split.get("dropped_tokens"):
                lines.append(f"{name}: {dropped:,} tokens are in no window: window_mode=published")
            decoded = split.get("decoded", {"altered": 0})
            if decoded["altered"]:
                lines.append(
                    f"{name}: {decoded['altered']:,} of the first {decoded['checked']:,} documents "
                    f"differ after encoding and decoding by the {self.tokenizer['kind']} tokenizer"
                )
        return lines

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer in `directory`. Raises UserError if it is not the one of the manifest."""
        tokenizer = open_tokenizer(self.directory)
        if tokenizer.fingerprint != self.tokenizer["fingerprint"]:
            raise UserError(f"{self.directory}: the tokenizer is not the one of {MANIFEST_FILE}")
        return tokenizer

    def copy_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer to another folder, unless an intact copy is there."""
        try:
            if open_tokenizer(folder).fingerprint == self.tokenizer["fingerprint"]:
                return
        except UserError:
            pass
        with results.draft_beside(folder) as draft:  # a full disk leaves the old folder unchanged
            self.load_tokenizer().save(draft)
            shutil.rmtree(folder, ignore_errors=True)
            draft.rename(folder)


def open_tokenizer(directory: str | Path) -> Tokenizer:
    """load_tokenizer; any error of a damaged tokenizer becomes a UserError."""
    try:
        return load_tokenizer(directory)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{directory}: the tokenizer cannot be read: {error.strerror}") from error
    except Exception as error:  # the tokenizer libraries raise many types
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"{directory}: the tokenizer is damaged: {type(error).__name__}: {what}"
        ) from error


def tokenizer_entry(tokenizer: Tokenizer) -> dict[str, Any]:
    names = ("kind", "fingerprint", "vocab_size", "mask_id", "bos_id", "eos_id", "pad_id")
    return {name: getattr(tokenizer, name) for name in names}


def content_fields(config: Any) -> dict[str, Any]:
    """The fields of config.data that determine the prepared data, for this source and tokenizer."""
    names = ["source", "seq_len", "packing", "tokenizer", *OF_WINDOWS]
    if config.data.tokenizer == "sentencepiece":
        names.append("tokenizer_path")
        if not config.data.tokenizer_path:  # a given model fixes the vocabulary
            names.append("vocab_size")
    if sources.get(config).given:
        names += ["train", "validation", "test", "holdout", "text_field", "files"]
    return {name: config.data[name] for name in names}


def write_manifest(manifest: Manifest) -> None:
    """Writes manifest.json, with digests of all files in its folder except the shards."""
    entries = dataclasses.asdict(manifest)
    directory = entries.pop("directory")  # not written, so that prepared data can be moved
    shards = {shard["file"] for split in manifest.splits.values() for shard in split["shards"]}
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    neighbours = files - shards - {MANIFEST_FILE}
    entries["files"] = integrity.hash_files(directory, sorted(neighbours))
    entries[integrity.DIGEST] = integrity.digest(entries)
    Path(directory, MANIFEST_FILE).write_text(results.dumps(entries, indent=2) + "\n")


def load_manifest(directory: str | Path) -> Manifest:
    """Reads and verifies manifest.json and its neighbouring files; of shards, only the sizes.

    Raises UserError if anything is missing, damaged, or of another version.
    """
    directory = Path(directory)
    path = directory / MANIFEST_FILE
    try:
        entries = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{directory}: no prepared data here; run `python -m esolm_jax.prepare` first, or "
            "set config.data.dir to their folder"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        what = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise UserError(f"{path}: cannot be read: {what}") from error
    version = entries.get("version") if isinstance(entries, dict) else None
    if version != VERSION:
        raise UserError(f"{path}: version={version!r:.40}: must be {VERSION}; prepare again")
    _check_entries(entries, path)
    try:
        manifest = Manifest(directory=directory, **entries)
        shards = [shard for split in manifest.splits.values() for shard in split["shards"]]
        wanted = {shard["file"]: shard["size_bytes"] for shard in shards}
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: corrupt: {error!r}; prepare again") from error
    for file, size in wanted.items():
        shard = directory / file
        actual = shard.stat().st_size if shard.is_file() else None
        if actual != size:
            state = "is missing" if actual is None else f"has {actual} bytes, not {size}"
            raise UserError(f"{shard}: the shard {state}; delete {directory} and prepare again")
    integrity.check_files(directory, manifest.files)
    if not manifest.files:
        manifest.unigram_counts()
        manifest.load_tokenizer()
    return manifest


def _check_entries(entries: dict[str, Any], path: Path) -> None:
    """UserError unless the entries match their digest (removed here), or are consistent."""
    recorded = entries.pop(integrity.DIGEST, None)
    if recorded is None and "files" not in entries:
        problem = integrity.structure_problem(entries)
    else:
        is_same = recorded == integrity.digest(entries)
        problem = None if is_same else "differs from its own digest"
    if problem:
        raise UserError(f"{path}: corrupt: {problem}; delete {path.parent} and prepare again")


def check(manifest: Manifest, config: Any) -> None:
    """Raises UserError if the prepared data do not match config.data."""
    wanted = content_fields(config)
    names = ("source", "seq_len", "packing", "tokenizer", "tokenizer_path", "vocab_size")
    names += OF_WINDOWS
    compare(manifest, {name: wanted[name] for name in names if name in wanted})


def compare(manifest: Manifest, wanted: dict[str, Any]) -> None:
    """Raises UserError naming the first field of `wanted` that was prepared with another value."""
    for name, value in wanted.items():
        prepared = manifest.data.get(name, BEFORE.get(name))
        if prepared != value:
            raise UserError(
                f"config.data.{name}={value!r}: must be {prepared!r}, because {manifest.directory} "
                "was prepared with it; choose another config.data.dir, or delete that folder"
            )


def data_dir(config, workdir: Path) -> Path:
    """The folder of the prepared data of a run."""
    return Path(config.data.dir).expanduser() if config.data.dir else workdir / "data"


def load_data(config, workdir: Path) -> Manifest:
    """The run's manifest; UserError if the data are missing or do not match config.data."""
    manifest = load_manifest(data_dir(config, workdir))
    check(manifest, config)
    return manifest


def planned_tokenizer(config) -> dict:
    """The manifest's entry of the tokenizer of config.data before `prepare`, as far as a model
    needs it. A SentencePiece model is assumed to have data.vocab_size tokens."""
    text8 = Text8.vocab_size, Text8.mask_id, Text8.bos_id
    published = {"bert": (30522, 103, 101), "gpt2": (50257, 50257, 50256), Text8.kind: text8}
    size = Bytes.vocab_size if config.data.tokenizer == "bytes" else config.data.vocab_size
    entry = published.get(config.data.tokenizer, (size, size, 0))
    return dict(zip(("vocab_size", "mask_id", "bos_id"), entry, strict=True))
