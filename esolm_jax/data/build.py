"""prepare(): documents -> tokenizer -> windows -> ArrayRecord shards and a manifest."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from esolm_jax.data import pack, sources, windows
from esolm_jax.data.manifest import (
    MANIFEST_FILE,
    UNIGRAM_FILE,
    Manifest,
    compare,
    content_fields,
    load_manifest,
    tokenizer_entry,
    write_manifest,
)
from esolm_jax.data.pack import Packer, Tally, check_not_empty
from esolm_jax.data.render import num_ids
from esolm_jax.data.tokenizer import KINDS, Tokenizer, from_config, trains
from esolm_jax.errors import UserError, nearest
from esolm_jax.files import workdir_lock

SHARD_WINDOWS = 65536


def prepare(config: Any, directory: str | Path, *, progress: bool = True) -> Manifest:
    """Prepares the data of `config` in `directory`, all of it or nothing; returns the manifest.

    A directory that holds the same data from the same source is left unchanged. Raises UserError
    for bad config or input, and if `directory` holds anything else.
    """
    check_config(config)
    if trains(config) and "train" not in sources.splits(config):
        raise UserError(
            "config.data.train='': must name text, because a SentencePiece tokenizer is trained on "
            "it; or name a trained one in config.data.tokenizer_path"
        )
    directory = Path(os.path.abspath(os.path.expanduser(directory)))
    if (directory / MANIFEST_FILE).exists():
        return _already_prepared(config, directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(
            f"config.data.dir={directory}: must be empty or hold {MANIFEST_FILE}; choose another "
            "folder"
        )
    with _partial(directory) as partial:
        if progress:
            for note in sources.notes(config):
                print(f"note: {note}")
        states, source_hash = sources.file_states(config), sources.source_hash(config)
        tokenizer = from_config(config, lambda: sources.documents(config, "train"))
        tokenizer.save(partial)
        splits = {
            split: _write_split(config, split, tokenizer, partial, progress)
            for split in sources.splits(config)
        }
        for path, state in sources.file_states(config).items():
            if states.get(path) != state:
                raise UserError(f"{path}: changed during the read; prepare again")
        manifest = Manifest(
            directory=partial,
            source=config.data.source,
            source_hash=source_hash,
            data=content_fields(config),
            tokenizer=tokenizer_entry(tokenizer),
            seq_len=config.data.seq_len,
            packing=config.data.packing,
            dtype=windows.record_dtype(num_ids(tokenizer)),
            splits=splits,
        )
        write_manifest(manifest)
        os.rename(partial, directory)  # fails if another process has filled `directory`
    return load_manifest(directory)


def check_config(config: Any) -> None:
    """Raises UserError for values of config.data that are wrong for any data."""
    data = config.data
    for name, allowed in (("packing", windows.PACKINGS), ("tokenizer", KINDS)):
        if data[name] not in allowed:
            raise UserError(
                f"config.data.{name}={data[name]!r}: must be one of {', '.join(allowed)}"
                f"{nearest(str(data[name]), allowed)}"
            )
    if data.seq_len < 1:
        raise UserError(f"config.data.seq_len={data.seq_len}: must be at least 1")
    if sources.get(config).given and not 0 < data.holdout < 0.5:
        raise UserError(f"config.data.holdout={data.holdout}: must be in (0, 0.5)")
    pack.check(config)


def _already_prepared(config: Any, directory: Path) -> Manifest:
    manifest = load_manifest(directory)
    compare(manifest, content_fields(config))
    advice = "choose another config.data.dir, or delete that folder"
    source_hash = sources.source_hash(config)
    if manifest.source_hash != source_hash:
        raise UserError(
            f"{directory}: was prepared from other content of config.data.source="
            f"{config.data.source!r} (hash {manifest.source_hash[:12]}, now {source_hash[:12]}); "
            f"{advice}"
        )
    if config.data.tokenizer_path and not trains(config):
        now = from_config(config, lambda: ()).fingerprint
        if manifest.tokenizer["fingerprint"] != now:
            raise UserError(
                f"{directory}: was prepared with another tokenizer in config.data.tokenizer_path="
                f"{config.data.tokenizer_path!r}; {advice}"
            )
    print(f"already prepared: {directory}")
    return manifest


@contextlib.contextmanager
def _partial(directory: Path) -> Iterator[Path]:
    """A fresh sibling of `directory` to write in and then rename; removed on any error.

    A lock distinguishes the folder of a running process from that of a killed one.
    """
    partial = directory.with_name(f".{directory.name}.preparing")
    name = f"config.data.dir={str(directory)!r}"
    with workdir_lock.hold(partial.parent, name=name, file=f"{partial.name}.lock"):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _write_split(
    config: Any, split: str, tokenizer: Tokenizer, directory: Path, progress: bool
) -> dict[str, Any]:
    """Writes the shards of one split (for train also the unigram counts); its manifest entry."""
    tally, digest = Tally(), hashlib.sha256()
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    dtype = windows.record_dtype(num_ids(tokenizer))
    bar = tqdm(desc=split, unit=" documents", disable=not progress)
    num_windows = num_tokens = num_specials = 0

    def done() -> None:
        bar.set_postfix_str(f"{tally.num_bytes / 1e6:.1f} MB", refresh=False)
        bar.update()

    packer = Packer.of(config, tokenizer, tally, done)

    def records() -> Iterator[bytes]:
        nonlocal num_windows, num_tokens, num_specials
        for window in packer.windows(split):
            record = windows.to_record(window, dtype)
            num_windows += 1
            num_tokens += len(window)
            num_specials += 2 if packer.specials else 0
            digest.update(record)
            if split == "train":
                np.add.at(counts, window, 1)
            yield record

    with bar:
        shards = _write_shards(records(), directory, split)
    check_not_empty(config, split, tally, num_windows)
    if split == "train":
        np.save(directory / UNIGRAM_FILE, counts)
    kept = num_tokens - num_specials
    return {
        "documents": tally.documents,
        # Of the text in the windows: what is dropped is taken to have as many bytes per token.
        "bytes": round(tally.num_bytes * kept / tally.tokens),
        "tokens": num_tokens,
        "windows": num_windows,
        "dropped_tokens": tally.tokens - kept,
        "decoded": {"checked": tally.checked, "altered": tally.altered},
        "shards": shards,
        "sha256": digest.hexdigest(),
    }


def _write_shards(records: Iterator[bytes], directory: Path, split: str) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = []
    writer = None
    try:
        for i, record in enumerate(records):
            if i % SHARD_WINDOWS == 0:
                if writer:
                    writer.close()
                file = f"{split}-{len(shards):05d}.array_record"
                # Groups of one record, so that random access reads one record.
                writer = ArrayRecordWriter(str(directory / file), "group_size:1")
                shards.append({"file": file, "windows": 0})
            writer.write(record)
            shards[-1]["windows"] += 1
    finally:
        if writer:
            writer.close()
    for shard in shards:
        shard["size_bytes"] = (directory / shard["file"]).stat().st_size
    return shards
