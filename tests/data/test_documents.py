"""What a document is, in every kind of file, and which documents a range selects."""

import gzip
import json
import pathlib

import pyarrow as pa
import pytest
import tensorflow_datasets as tfds
from pyarrow import parquet
from text_config import config

from esolm_jax.data import build, sources, text_documents
from esolm_jax.errors import UserError
from esolm_jax.evaluation import protocol

TEXTS = ["one two", "drei – vier", "", "five\nsix", "sieben"]


def read(split="test", train="", **data):
    return list(sources.documents(config(train, **data), split))


def compressed(path: pathlib.Path, data: bytes) -> None:
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compressed_files(tmp_path, suffix):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    compressed(tmp_path / f"a.jsonl{suffix}", lines)
    compressed(tmp_path / f"b.txt{suffix}", b"nine\nten\n")
    found = read(test=str(tmp_path), document="line", keep_blank=True)
    assert found == [*TEXTS, "nine", "ten"]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "file.arrow"])
def test_tables(tmp_path, name):
    table = pa.table({"id": range(5000), "body": pa.array(TEXTS * 1000, pa.string())})
    path = tmp_path / name
    if name.endswith(".parquet"):
        parquet.write_table(table, path, row_group_size=700, compression="zstd")
    else:
        new = pa.ipc.new_file if name.startswith("file") else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=333)
    assert read(test=str(tmp_path), text_field="body", keep_blank=True) == TEXTS * 1000
    for field, message in (
        ("text", "no column config.data.text_field='text'; has: id, body"),
        ("id", "column config.data.text_field='id': must hold text, not int64"),
    ):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            read(test=str(path), text_field=field)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{name}: cannot be read: "):
        read(test=str(path), text_field="body")


def test_a_null_of_a_table_is_told(tmp_path):
    parquet.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet, row 1: column 'text': must be text, not None"):
        read(test=str(tmp_path))


def test_a_zstd_bomb_is_refused_early(tmp_path):
    compressed(tmp_path / "a.txt.zst", b" " * 40 * 2**20)
    with pytest.raises(UserError, match="a.txt.zst: a zstd bomb: .* more than 200 times as many"):
        read(test=str(tmp_path))


FILE = "first line\nsecond\n\n \t\nthird – line\nfourth\n\n\nfifth\n"
DOCUMENTS = {
    "file": [FILE],
    "line": ["first line", "second", "", "", "third – line", "fourth", "", "", "fifth"],
    "line_with_newline": [
        "first line\n", "second\n", "", "", "third – line\n", "fourth\n", "", "", "fifth\n",
    ],
    "paragraph": ["first line\nsecond", "third – line\nfourth", "fifth"],
    "separator": ["first line\nsecond\n\n \t\nthird", "line\nfourth\n\n\nfifth\n"],
}  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.parametrize("block", [1, 2, 3, 7, 2**20])
def test_documents_of_a_text_file(tmp_path, monkeypatch, document, block):
    """The same, wherever the blocks end that are read."""
    monkeypatch.setattr(text_documents, "_BLOCK", block)
    path = tmp_path / "a.txt"
    path.write_text(FILE, encoding="utf-8")
    separator = " – " if document == "separator" else ""
    given = dict(test=str(path), document=document, separator=separator)
    assert read(**given, keep_blank=True) == DOCUMENTS[document]
    assert read(**given) == [text for text in DOCUMENTS[document] if text]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_beyond_the_limit_is_told(tmp_path, monkeypatch, document):
    monkeypatch.setattr(text_documents, "MAX_READ", 1000)
    monkeypatch.setattr(text_documents, "_BLOCK", 100)
    (tmp_path / "a.txt").write_text("x" * 1001)
    separator = "|" if document == "separator" else ""
    with pytest.raises(UserError, match="a.txt.*: must be at most 1,000 bytes, because a .*whole"):
        read(test=str(tmp_path), document=document, separator=separator)


def test_bad_utf8_names_the_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\nb\xe9d\n")
    for document in ("line", "paragraph", "file"):
        with pytest.raises(UserError, match="a.txt: not UTF-8 at byte 7:"):
            read(test=str(tmp_path), document=document)


def test_a_separator_belongs_to_its_document(tmp_path):
    for fields, message in (
        ({"document": "separator"}, "config.data.separator='': must not be ''"),
        ({"separator": "|"}, "config.data.separator='|': must be '', because .* is piece"),
    ):
        with pytest.raises(UserError, match=message):
            build.prepare(config("a.txt", **fields), tmp_path / "data", progress=False)


@pytest.mark.parametrize("name", ["ptb", "wikitext", "lm1b", "lambada", "scientific_papers"])
def test_documents_are_detokenized(tmp_path, name):
    texts = ["it 's N N @-@ one .", "“ a b ” ( c ) ?"]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    found = read(test=str(tmp_path), document="line", detokenizer=name)
    assert found == [protocol.detokenize(name, text) for text in texts]


# Ranges


class Numbers(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(20)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": f"text {i}"}


RANGES = ["[:-5]", "[-5:]", "[3:7]", "[:25%]", "[-25%:]", "[:]", "[18:99]"]


def sliced(texts, text):
    """The range by Python's slices."""
    bounds = text[1:-1].split(":")
    return texts[
        slice(*[int(b[:-1]) * len(texts) // 100 if "%" in b else int(b) if b else None
                for b in bounds])
    ]  # fmt: skip


@pytest.mark.parametrize("text", RANGES)
def test_ranges_of_files(tmp_path, text):
    texts = [f"text {i}" for i in range(20)]
    for part in (0, 1):
        lines = [json.dumps({"text": t}) + "\n" for t in texts[10 * part : 10 * part + 10]]
        (tmp_path / f"{part}.jsonl").write_text("".join(lines))
    wanted = sliced(texts, text)
    assert read(test=f"{tmp_path}{text}") == wanted
    assert read(test=f"{tmp_path}/*.jsonl{text}") == wanted
    assert read(files=str(tmp_path), train="train[:-3]", test=f"train{text}") == wanted


def test_ranges_of_tfds_are_the_same(tmp_path):
    """As of a file with the same documents, and as TFDS slices them where it does."""
    given = dict(source="tfds:numbers", tfds_dir=str(tmp_path), validation="train[:1]")
    rows = read("test", test="train", **given)
    assert len(rows) == 20
    (tmp_path / "a.txt").write_text("\n".join(rows))
    builder = tfds.builder("numbers", data_dir=tmp_path)
    for text in [*RANGES, "[:33%]", "[-33%:-5%]", "[12%:]", "[-99:5]"]:
        found = read("test", test=f"train{text}", **given)
        assert found == read(test=f"{tmp_path}/a.txt{text}", document="line"), text
        if "99" not in text and text != "[:]":  # TFDS refuses these
            own = builder.as_data_source(f"train{text}")
            assert found == [row["text"].decode() for row in own], text
    joined = read("test", test="train[:3] + train[-2:]", **given)
    assert joined == rows[:3] + rows[-2:]


def test_a_held_out_split_is_of_the_range(tmp_path):
    texts = [f"text {i}" for i in range(400)]
    path = tmp_path / "a.txt"
    path.write_text("\n".join(texts))
    given = dict(files=str(path), train="train[:-100]", test="train[-100:]", document="line")
    parts = {split: read(split, **given) for split in sources.SPLITS}
    assert parts["test"] == texts[300:] and parts["validation"]
    assert sorted(parts["train"] + parts["validation"]) == sorted(texts[:300])


MALFORMED = ["[5]", "[a:b]", "[1:2:3]", "[:2", "[:1.5%]", "[:2shard]", "[ :2]"]


@pytest.mark.parametrize("source", ["text", "tfds:numbers"])
def test_bad_ranges_of_any_source(tmp_path, source):
    """One error, of the same words for every source."""
    given = dict(source=source, tfds_dir=str(tmp_path), validation="train[:1]", document="line")
    if source == "text":
        (tmp_path / "a.txt").write_text("\n".join(f"text {i}" for i in range(20)))
        given["files"] = str(tmp_path / "a.txt")
    empty = r"config.data.test='train\{}': must be a range with at least one document{}$"
    has = ", because it has 20 documents"
    for text in ("[20:]", "[:-20]", "[-3:-5]", "[:0%]", "[30:40]"):
        with pytest.raises(UserError, match=empty.format(text, has)):
            read(test=f"train{text}", **given)
    with pytest.raises(UserError, match=empty.format("[5:3]", f"({has})?")):
        read(test="train[5:3]", **given)
    for text in MALFORMED:
        with pytest.raises(UserError, match=r"config.data.test='train\[.*must end with a range"):
            read(test=f"train{text}", **given)


def test_bad_ranges_of_paths(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    for test, message in (
        (f"{tmp_path}[5:3]", r"config.data.test=.*\[5:3\]': must be a range with at least one"),
        (f"{tmp_path}[:-2]", "because it has 2 documents"),
        (f"{tmp_path}[2:]", "because it has 2 documents"),
        (f"{tmp_path}[1:b]", r"config.data.test=.*\[1:b\]': must end with a range"),
        ("train[:1]", "names the files of config.data.files, which is ''; set it"),
    ):
        with pytest.raises(UserError, match=message):
            given = config("", test=test, document="line")
            sources.file_states(given)
            list(sources.documents(given, "test"))
    assert read(test=f"{tmp_path}/[a-c].txt", document="line") == ["one", "two"]  # a glob


def test_a_test_set_alone_is_enough(tmp_path):
    (tmp_path / "a.txt").write_text("some words\n" * 9)
    given = config("", test=str(tmp_path), document="line")
    manifest = build.prepare(given, tmp_path / "data", progress=False)
    assert list(manifest.splits) == ["test"] and manifest.splits["test"]["windows"]
    with pytest.raises(UserError, match="split 'train': must be one of test, the splits that"):
        manifest.unigram_counts()
    given.data.tokenizer = "sentencepiece"
    with pytest.raises(UserError, match="config.data.train='': must name text, because a Sentence"):
        build.prepare(given, tmp_path / "other", progress=False)
    with pytest.raises(UserError, match="config.data.train='': must name files"):
        build.prepare(config(""), tmp_path / "other", progress=False)
