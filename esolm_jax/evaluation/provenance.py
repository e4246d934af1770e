"""The provenance of an evaluation's figures: data, evaluated windows, unigram baseline."""

import os
import pathlib

from esolm_jax import results
from esolm_jax.data.later_fields import BEFORE, OF_WINDOWS
from esolm_jax.data.manifest import Manifest
from esolm_jax.data.reader import unigram_perplexity


def training_data(manifest: Manifest) -> dict:
    """Identifies the training text in a checkpoint's meta."""
    return {
        "source": manifest.source,
        "source_hash": manifest.source_hash,
        "train_sha256": manifest.split("train")["sha256"],
    }


def evaluated_data(manifest: Manifest, split: str, windows: int) -> dict:
    """The data entry of evaluate.json: the source, its files as named in the config, hashes, and
    the evaluated part of the split. A source's hash covers its files' content, a split's hash its
    windows."""
    entry = manifest.split(split)
    names = ("files", "train", "validation", "test", "holdout", "text_field")
    return {
        "source": manifest.source,
        "files": {name: manifest.data[name] for name in names if name in manifest.data},
        "source_hash": manifest.source_hash,
        "split": split,
        "split_sha256": entry["sha256"],
        "split_documents": entry["documents"],
        "split_windows": entry["windows"],
        "split_tokens": entry["tokens"],
        "windows": windows,
        "whole_split": windows == entry["windows"],
        "seq_len": manifest.seq_len,
        "packing": manifest.packing,
        **{name: manifest.data.get(name, BEFORE[name]) for name in OF_WINDOWS},
        "dropped_tokens": entry.get("dropped_tokens", 0),
        "tokenizer": manifest.tokenizer["fingerprint"],
    }


def unigram(manifest: Manifest, meta: dict, split: str, max_windows: int) -> tuple:
    """(perplexity under the unigram model of the training text, ""), or (None, the reason). Counts
    of another text, such as the evaluated one, are not a baseline for the model."""
    reason = _not_the_models_text(manifest, meta)
    train = manifest.splits.get("train")
    if not reason and split != "train" and manifest.split(split)["sha256"] == train["sha256"]:
        reason = f"the train split is the {split} split"
    if reason:
        return None, f"unigram counts are of these data's train split: {reason}"
    return unigram_perplexity(manifest, split, max_windows), ""


def _not_the_models_text(manifest: Manifest, meta: dict) -> str:
    """Why the train split may differ from the model's training text, or ""."""
    if "train" not in manifest.splits:
        return "there is none"
    trained_on = meta.get("training_data")
    if trained_on:
        ours = training_data(manifest)
        same = any(ours[name] == trained_on.get(name) for name in ("source_hash", "train_sha256"))
        return "" if same else "not the text that the model was trained on"
    if meta.get("converted"):
        return "what the converted model was trained on is not known"
    config = meta["config"]["data"]  # an older checkpoint: compare the fields of config.data
    fields = ("source", "train", "validation", "test", "holdout")
    differs = [name for name in fields if manifest.data.get(name, config[name]) != config[name]]
    return f"prepared with another config.data.{differs[0]} than the model's" if differs else ""


def append_line(path: pathlib.Path, value) -> None:
    """Appends a line of strict JSON in one write and syncs it to disk. First ends a torn last line
    of a killed run."""
    line = results.dumps(value).encode() + b"\n"
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        end = os.lseek(file, 0, os.SEEK_END)
        if end and os.pread(file, 1, end - 1) != b"\n":
            line = b"\n" + line
        os.write(file, line)
        os.fsync(file)
    finally:
        os.close(file)
