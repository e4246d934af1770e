"""Small corpora: every split has a document, and what was split before stays as it was."""

import json
import random

import pytest
from text_config import config

from esolm_jax.data import build, holdout, sources, text_files
from esolm_jax.errors import UserError

WORDS = "to be or not that is the question whether tis nobler in mind suffer slings".split()


def splits_of(config):
    return {split: list(sources.documents(config, split)) for split in sources.SPLITS}


def random_text(rng, size: int) -> str:
    text = ""
    while len(text) < size:
        text += rng.choice(WORDS) + rng.choice(["\n", " ", " ", " "])
    return text[:size]


def write(folder, rng, size: int, suffix: str, documents: int):
    """A corpus of `size` bytes in so many files of .txt, or lines of .jsonl."""
    texts = [random_text(rng, size // documents) for _ in range(documents)]
    if suffix == ".jsonl":
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        return texts
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    return texts


@pytest.mark.parametrize("documents", [1, 2, 3, 10])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("size", [500, 5_000, 20_000, 50_000])
def test_every_split_of_a_small_corpus_has_text(tmp_path, size, suffix, documents):
    for trial in range(4):
        folder = tmp_path / str(trial)
        folder.mkdir()
        rng = random.Random(1000 * trial + documents)
        texts = write(folder, rng, size, suffix, documents)
        splits = splits_of(config(folder))
        assert all(any(text.strip() for text in splits[name]) for name in sources.SPLITS)
        assert not set(splits["train"]) & {*splits["validation"], *splits["test"]}
        assert not set(splits["validation"]) & set(splits["test"])
        have = sorted("".join(sum(splits.values(), [])))
        assert have == sorted("".join(texts))  # every character, in one split
        held = sum(map(len, splits["validation"] + splits["test"]))
        before = by_hash_alone(text_files.documents(config(folder), "train", str(folder)), 0.05)
        assert splits == before if all(before.values()) else held < 0.5 * sum(map(len, texts))


def by_hash_alone(texts, share: float) -> dict[str, list[str]]:
    """The splits as they were before any were repaired."""
    found = {split: [] for split in sources.SPLITS}
    for text in texts:
        at = holdout.text_hash(text)
        name = "validation" if at < share else "test" if at < 2 * share else "train"
        found[name].append(text)
    return found


@pytest.mark.parametrize("share", [0.05, 0.2, 0.45])
def test_splits_that_have_documents_are_not_changed(tmp_path, share):
    """Documents stay in the split of their hash; only an empty split receives another one."""
    path, rng, changed = tmp_path / "a.jsonl", random.Random(0), 0
    for _ in range(80):
        texts = [random_text(rng, 30) for _ in range(rng.choice([5, 10, 15]))]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        splits, before = splits_of(config(path, holdout=share)), by_hash_alone(texts, share)
        if not all(before.values()) and len(texts) < holdout.MANY:
            continue  # these are cut
        empty = [name for name in sources.SPLITS if not before[name]]
        moved = [text for name in splits for text in splits[name] if text not in before[name]]
        assert len(moved) <= 2 * len(empty)
        assert empty or splits == before
        changed += bool(empty)
    assert changed


@pytest.mark.parametrize("given", ["validation", "test"])
def test_one_split_that_is_missing_is_held_out(tmp_path, given):
    other = tmp_path / "other.txt"
    other.write_text("given")
    for trial in range(30):
        path = tmp_path / f"{trial}.jsonl"
        write(tmp_path, random.Random(trial), 200, ".jsonl", 2)
        (tmp_path / "a.jsonl").rename(path)
        splits = splits_of(config(path, **{given: str(other)}))
        assert splits[given] == ["given"]
        (missing,) = {"validation", "test"} - {given}
        assert len(splits[missing]) == len(splits["train"]) == 1


def test_equal_documents_stay_together(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = ["first", "second", "third"] * 5
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    splits = splits_of(config(path))
    assert sorted(map(len, splits.values())) == [5, 5, 5]


@pytest.mark.parametrize("text", ["a", "a b", "xx"])
def test_text_that_cannot_be_divided_is_told(tmp_path, text):
    """Too short, or the same again and again."""
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError, match="divided into .*: give config.data.validation and") as told:
        splits_of(config(tmp_path))
    assert "\n" not in str(told.value)


def test_text_without_spaces_is_divided(tmp_path):
    (tmp_path / "a.txt").write_text("".join(chr(0x4E00 + i) for i in range(100)))
    assert all(splits_of(config(tmp_path)).values())


@pytest.mark.parametrize("packing", ["wrap", "pad"])
def test_a_single_sentence_is_prepared(tmp_path, packing):
    (tmp_path / "a.txt").write_text("To be, or not to be, that is the question.")
    manifest = build.prepare(
        config(tmp_path / "a.txt", packing=packing), tmp_path / "data", progress=False
    )
    assert all(manifest.splits[split]["windows"] for split in sources.SPLITS)
