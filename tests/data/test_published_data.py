"""`prepare` makes the windows of the published code bit for bit, and says what that drops."""

import hashlib

import numpy as np
import pyarrow as pa
import pytest
from golden_eval import FOLDER, read_json
from pyarrow import parquet
from text_config import config, prepared_windows

from esolm_jax.data import build
from esolm_jax.errors import UserError
from esolm_jax.evaluation import protocol

GOLDEN = read_json("windows.json")
DOCUMENTS = GOLDEN["documents"] | {"hollow": [""] * 1000 + GOLDEN["documents"]["small"]}
FOLDERS = {"bpe": FOLDER / "tokenizer_bpe", "wordpiece": FOLDER / "tokenizer_wordpiece"}
KINDS = {"bpe": "gpt2", "wordpiece": "bert"}
CASES = [case for case in GOLDEN["cases"] if case["tokenizer"] in KINDS]
CLEAN = {"wikitext", "ptb", "lm1b", "lambada", "scientific_papers"}


def write_table(path, texts):
    parquet.write_table(pa.table({"text": pa.array(texts, pa.string())}), path)
    return str(path)


def fields_of(case):
    """The fields of config.data that are a case's settings."""
    is_bert, name = case["tokenizer"] == "wordpiece", case["dataset"]
    end = ("bos" if is_bert else "eos") if case["insert_eos"] else "none"
    specials = ("bos_bos" if is_bert else "bos_eos") if case["insert_special_tokens"] else "none"
    if not case["wrap"]:
        end, specials = "none", "bos_eos"
    return dict(
        detokenizer=next((known for known in CLEAN if name.startswith(known)), "none"),
        keep_blank=True,
        packing="wrap" if case["wrap"] else "pad",
        document_end=end,
        window_specials=specials,
        window_mode="published",
        window_shards=case["num_proc"],
        seq_len=case["block_size"],
        tokenizer=KINDS[case["tokenizer"]],
        tokenizer_path=str(FOLDERS[case["tokenizer"]]),
    )


def documents_of(case):
    name = case["documents"]
    return DOCUMENTS[name[0]][name[1] : name[2]] if isinstance(name, list) else DOCUMENTS[name]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_windows_are_those_of_the_published_code(case, tmp_path):
    path = write_table(tmp_path / "a.parquet", documents_of(case))
    given = config("", test=path, **fields_of(case))
    if not case.get("count", 1):
        with pytest.raises(UserError, match=r"config.data.test: has no windows: all [\d,]+ tokens"):
            build.prepare(given, tmp_path / "data", progress=False)
        return
    manifest = build.prepare(given, tmp_path / "data", progress=False)
    windows = prepared_windows(manifest, "test")
    if "error" in case:  # of `datasets`; ours are the windows by the rules
        assert windows == case["windows_if_it_had_not_failed"]
        return
    assert len(windows) == case["count"]
    assert sum(map(len, windows)) == manifest.splits["test"]["tokens"] == case["tokens"]["scored"]
    if case["wrap"]:
        ids = np.array(windows, "<i4")
        assert hashlib.sha256(ids.tobytes()).hexdigest() == case["sha256"]
    else:
        rows = zip(case["windows"], case["attention_mask"], strict=True)
        assert windows == [[i for i, kept in zip(*row, strict=True) if kept] for row in rows]


def test_what_is_dropped_is_counted(tmp_path, capsys):
    texts = DOCUMENTS["mid"]
    path = write_table(tmp_path / "a.parquet", texts)
    settings = dict(tokenizer="gpt2", tokenizer_path=str(FOLDERS["bpe"]), seq_len=64)
    settings |= dict(document_end="none", keep_blank=True)
    counts = {}
    for name, given in (
        ("all", {}),
        ("published", dict(window_mode="published", window_shards=7)),
    ):
        made = config("", test=path, **settings, **given)
        entry = build.prepare(made, tmp_path / name, progress=False).splits["test"]
        counts[name] = entry["tokens"], entry["dropped_tokens"], entry["bytes"]
    assert counts["all"][1] == 0 and counts["published"][1] > 0
    assert sum(counts["published"][:2]) == counts["all"][0]  # these texts spell no specials
    share = counts["published"][0] / counts["all"][0]
    assert abs(counts["published"][2] - share * counts["all"][2]) <= 1


def test_nothing_is_dropped_between_specials(tmp_path):
    """window_mode=all: the text of all windows, joined, is the text of all documents."""
    texts = ["one two three", "", "four", "five six seven eight nine ten"]
    path = write_table(tmp_path / "a.parquet", texts)
    given = config("", test=path, document_end="bos", window_specials="bos_eos", keep_blank=True)
    windows = prepared_windows(build.prepare(given, tmp_path / "data", progress=False), "test")
    assert all(window[0] == 256 and window[-1] == 257 for window in windows)
    assert all(len(window) == 16 for window in windows[:-1])
    joined = [i for text in texts for i in [*text.encode(), 256]]
    assert [i for window in windows for i in window[1:-1]] == joined


@pytest.mark.parametrize("split, share", [("train", (0, 90)), ("validation", (90, 95))])
@pytest.mark.parametrize("mode", ["all", "published"])
def test_text8(tmp_path, split, share, mode):
    characters = "the quick brown fox jumps over a lazy dog " * 40
    path = tmp_path / "text8"
    path.write_text(characters)
    settings = dict(source="text8", tokenizer="text8", document_end="none", window_mode=mode)
    manifest = build.prepare(config(path, **settings), tmp_path / "data", progress=False)
    start, stop = (len(characters) * percent // 100 for percent in share)
    windows = prepared_windows(manifest, split)
    published = protocol.windows(
        characters[start:stop],
        "text8",
        dataset="text8",
        block_size=16,
        insert_special_tokens=False,
    ).tolist()
    assert windows[: len(published)] == published
    rest = manifest.load_tokenizer().encode(characters[start:stop])[16 * len(published) :]
    assert rest and windows[len(published) :] == ([rest] if mode == "all" else [])


def test_published_defaults_of_text8(tmp_path):
    """BOS and EOS around 14 tokens, and an EOS behind each 16 characters."""
    characters = "abcdefghijklmnopqrstuvwxyz " * 60
    (tmp_path / "text8").write_text(characters)
    settings = dict(source="text8", tokenizer="text8", window_mode="published")
    given = config(tmp_path / "text8", window_specials="bos_eos", **settings)
    manifest = build.prepare(given, tmp_path / "data", progress=False)
    test = characters[len(characters) * 95 // 100 :]
    published = protocol.windows(test, "text8", dataset="text8", block_size=16, insert_eos=True)
    assert prepared_windows(manifest, "test") == published.tolist()


def test_a_wrong_text8_is_told(tmp_path):
    settings = dict(source="text8", tokenizer="text8")
    for content, message in (
        ("Not text", "text8: has the byte b'N': text8 has only a to z and spaces"),
        (None, "config.data.train='.*text8': no such file"),
    ):
        path = tmp_path / "text8"
        path.unlink(missing_ok=True)
        if content:
            path.write_text(content * 99)
        with pytest.raises(UserError, match=message):
            build.prepare(config(path, **settings), tmp_path / "data", progress=False)
    with pytest.raises(UserError, match="must name text8.zip .*mattmahoney"):
        build.prepare(config("", **settings), tmp_path / "data", progress=False)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_the_tokenizers_of_the_paper_are_required(kind, tmp_path):
    name = {"gpt2": "bpe", "bert": "wordpiece"}[kind]
    path = write_table(tmp_path / "a.parquet", ["a text"])
    for fields, message in (
        ({}, f"must name the files of the {kind} tokenizer: .* huggingface.co/"),
        ({"tokenizer_path": str(tmp_path)}, "holds no tokenizer.*; get .*huggingface.co/"),
        (
            {"tokenizer_path": str(FOLDERS[name]), "tokenizer_ids": 50257},
            r"config.data.tokenizer_path='.*': must have config.data.tokenizer_ids=50257 ids, not",
        ),
    ):
        given = config("", test=path, tokenizer=kind, **fields)
        with pytest.raises(UserError, match=message):
            build.prepare(given, tmp_path / "data", progress=False)


def test_texts_that_tokens_do_not_spell_are_counted(tmp_path):
    texts = ["plain words", "Upper Case", "two  spaces", "words"]
    settings = dict(tokenizer="bert", tokenizer_path=str(FOLDERS["wordpiece"]))
    given = config("", test=write_table(tmp_path / "a.parquet", texts), **settings)
    manifest = build.prepare(given, tmp_path / "data", progress=False)
    tokenizer = manifest.load_tokenizer()
    altered = sum(tokenizer.decode(tokenizer.encode(text)) != text for text in texts)
    assert altered and manifest.splits["test"]["decoded"] == {"checked": 4, "altered": altered}
    assert f"test: {altered} of the first 4 documents differ" in manifest.notes()[0]
