"""prepare(): exact content, all or nothing, and never over something else."""

import json
import os
import subprocess
import sys
import tracemalloc

import grain
import ml_collections
import numpy as np
import pytest

from esolm_jax.data import build, sources
from esolm_jax.data.later_fields import BEFORE
from esolm_jax.data.manifest import check, load_manifest
from esolm_jax.data.tokenizer import train_sentencepiece
from esolm_jax.errors import UserError


def make_config(train, **data):
    defaults = dict(
        source="text",
        train=str(train),
        validation="",
        test="",
        holdout=0.2,
        text_field="text",
        tfds_dir="",
        **BEFORE,
        seq_len=16,
        packing="wrap",
        tokenizer="bytes",
        tokenizer_path="",
        vocab_size=300,
    )
    return ml_collections.ConfigDict({"seed": 0, "data": defaults | data})


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    documents = [f"Document {i} says é " + "la " * (i % 9) for i in range(150)]
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return path


def prepare(config, directory):
    return build.prepare(config, directory, progress=False)


def windows(manifest, split):
    source = grain.sources.ArrayRecordDataSource(manifest.shard_paths(split))
    return [np.frombuffer(source[i], manifest.dtype).tolist() for i in range(len(source))]


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("packing", ["wrap", "pad"])
def test_content(corpus, tmp_path, monkeypatch, packing, tokenizer):
    monkeypatch.setattr(build, "SHARD_WINDOWS", 10)
    config = make_config(corpus, packing=packing, tokenizer=tokenizer)
    manifest = prepare(config, tmp_path / "out" / "data")
    tok = manifest.load_tokenizer()
    assert tok.vocab_size == manifest.vocab_size == (259 if tokenizer == "bytes" else 300)
    for split in sources.SPLITS:
        documents = list(sources.documents(config, split))
        tokens = [tok.encode(d) + [tok.eos_id] for d in documents]
        got, entry = windows(manifest, split), manifest.splits[split]
        if packing == "wrap":
            assert sum(got, []) == sum(tokens, [])
        else:
            assert got == [t[:16] for t in tokens]
            documents = [  # only what the windows keep counts
                d if len(t) - 1 <= 16 else tok.decode(t[:16])
                for d, t in zip(documents, tokens, strict=True)
            ]
        assert entry["documents"] == len(documents) and entry["windows"] == len(got)
        assert entry["bytes"] == sum(len(d.encode()) for d in documents)
        assert entry["tokens"] == sum(map(len, got))
        assert all(shard["windows"] == 10 for shard in entry["shards"][:-1])
    assert len(manifest.splits["train"]["shards"]) > 1
    wanted = np.bincount(sum(windows(manifest, "train"), []), minlength=tok.vocab_size)
    assert manifest.unigram_counts().dtype == np.int64
    np.testing.assert_array_equal(manifest.unigram_counts(), wanted)


def test_sentencepiece_sees_only_train(corpus, tmp_path, monkeypatch):
    config = make_config(corpus, tokenizer="sentencepiece")
    seen = []
    train = build.from_config

    def spy(config, documents):
        seen.extend(documents())
        return train(config, documents)

    monkeypatch.setattr(build, "from_config", spy)
    prepare(config, tmp_path / "data")
    assert seen == list(sources.documents(config, "train"))


def test_same_again_is_left_alone(corpus, tmp_path, capsys):
    config = make_config(corpus)
    first = prepare(config, tmp_path / "data")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()}
    assert prepare(config, tmp_path / "data") == first
    assert "already prepared" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()}
    other = prepare(config, tmp_path / "other")
    assert other.splits == first.splits  # deterministic, sha256 and all


def test_other_data_are_refused(corpus, tmp_path):
    manifest = prepare(make_config(corpus), tmp_path / "data")
    for change in (dict(seq_len=32), dict(packing="pad"), dict(holdout=0.1)):
        ((name, value),) = change.items()
        message = f"config.data.{name}={value!r}: must be {manifest.data[name]!r}, because"
        with pytest.raises(UserError, match=message):
            prepare(make_config(corpus, **change), tmp_path / "data")
    check(manifest, make_config("elsewhere.txt", vocab_size=7))  # neither matters for reading
    for change in (dict(seq_len=8), dict(source="shakespeare"), dict(tokenizer="sentencepiece")):
        with pytest.raises(UserError, match=f"config.data.{next(iter(change))}="):
            check(manifest, make_config(corpus, **change))
    corpus.write_text(corpus.read_text().replace("says", "sang"))
    with pytest.raises(UserError, match="other content of config.data.source='text'"):
        prepare(make_config(corpus), tmp_path / "data")


def test_given_model_is_compared(corpus, tmp_path):
    trained = prepare(make_config(corpus, tokenizer="sentencepiece"), tmp_path / "a")
    path = str(tmp_path / "a" / "tokenizer.model")
    config = make_config(corpus, tokenizer="sentencepiece", tokenizer_path=path, vocab_size=9)
    manifest = prepare(config, tmp_path / "b")
    assert manifest.splits == trained.splits and manifest.vocab_size == 300
    prepare(config, tmp_path / "b")
    with pytest.raises(UserError, match="config.data.tokenizer_path='': must be"):
        check(manifest, make_config(corpus, tokenizer="sentencepiece"))
    train_sentencepiece(["other text " * 9, "and more"], 280).save(tmp_path / "a")
    with pytest.raises(UserError, match="another tokenizer in config.data.tokenizer_path="):
        prepare(config, tmp_path / "b")


def test_foreign_directory_is_refused(corpus, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    with pytest.raises(UserError, match="must be empty or hold manifest.json"):
        prepare(make_config(corpus), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    assert prepare(make_config(corpus), tmp_path / "empty").splits
    with pytest.raises(UserError, match="config.data.dir"):
        prepare(make_config(corpus), corpus / "data")


@pytest.mark.parametrize(
    ("name", "value"),
    [("packing", "warp"), ("tokenizer", "byte"), ("seq_len", 0), ("holdout", 0.5), ("holdout", 0)],
)
def test_bad_config(corpus, tmp_path, name, value):
    with pytest.raises(UserError, match=f"config.data.{name}={value!r}"):
        prepare(make_config(corpus, **{name: value}), tmp_path / "data")


def test_failure_leaves_nothing(corpus, tmp_path):
    with open(corpus, "a") as file:
        file.write("{bad\n")
    with pytest.raises(UserError, match="line 151: bad JSON"):
        prepare(make_config(corpus), tmp_path / "data")
    assert os.listdir(tmp_path) == ["corpus.jsonl"]


def test_killed_run_is_cleaned_up(corpus, tmp_path):
    config = make_config(corpus)
    script = (
        "import json, ml_collections, os, signal, sys\n"
        "from esolm_jax.data import build\n"
        "build.write_manifest = lambda manifest: os.kill(os.getpid(), signal.SIGKILL)\n"
        "config = ml_collections.ConfigDict(json.loads(sys.argv[1]))\n"
        "build.prepare(config, sys.argv[2], progress=False)\n"
    )
    command = [sys.executable, "-c", script, config.to_json(), str(tmp_path / "data")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, env=environment).returncode == -9
    assert (tmp_path / ".data.preparing").is_dir() and not (tmp_path / "data").exists()
    prepare(config, tmp_path / "data")
    assert sorted(os.listdir(tmp_path)) == ["corpus.jsonl", "data"]


def test_two_runs_at_once_are_refused(corpus, tmp_path):
    with build._partial(tmp_path / "data"):
        with pytest.raises(UserError, match="config.data.dir=.* is writing here already"):
            prepare(make_config(corpus), tmp_path / "data")


def test_damaged_manifest(corpus, tmp_path):
    with pytest.raises(UserError, match="python -m esolm_jax.prepare"):
        load_manifest(tmp_path / "data")
    manifest = prepare(make_config(corpus), tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    whole = path.read_text()
    entries = json.loads(whole)
    del entries["splits"]
    for text, message in [
        (whole[:100], "manifest.json: cannot be read"),
        (whole.replace('"version": 1', '"version": 7'), "version=7: must be 1"),
        ("[]", "version=None"),
        (json.dumps(entries), "manifest.json: corrupt"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_manifest(tmp_path / "data")
    path.write_text(whole)
    shard = tmp_path / "data" / manifest.splits["test"]["shards"][0]["file"]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="test-00000.array_record: the shard has"):
        load_manifest(tmp_path / "data")
    shard.unlink()
    with pytest.raises(UserError, match="test-00000.array_record: the shard is missing"):
        load_manifest(tmp_path / "data")


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    path = tmp_path / "big.txt"
    with open(path, "w") as file:
        for i in range(16_000):
            file.write(f"{i} " + "x" * (i % 1543) + "\n")
    assert path.stat().st_size > 12e6
    config = make_config(path, seq_len=1024)
    tracemalloc.start()
    prepare(config, tmp_path / "data")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
