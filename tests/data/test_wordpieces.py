"""GPT-2's BPE and BERT's WordPiece from local files: special ids, and one identity in all forms."""

import json

import ml_collections
import published_toy
import pytest

from esolm_jax.data import build, manifest, tokenizer, wordpieces
from esolm_jax.data.later_fields import BEFORE
from esolm_jax.data.manifest import planned_tokenizer
from esolm_jax.errors import UserError
from esolm_jax.model.build import num_ids

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the")]


@pytest.fixture
def gpt2(tmp_path):
    return published_toy.write_gpt2(tmp_path / "gpt2", MERGES)


@pytest.fixture
def bert(tmp_path):
    return published_toy.write_bert(tmp_path / "bert", size=67, mask=4)


def test_gpt2_is_lossless_and_its_mask_is_one_past_the_last_id(gpt2):
    t = wordpieces.read(gpt2)
    assert (t.kind, t.vocab_size, t.mask_id) == ("gpt2", 260, 260)
    assert t.bos_id == t.eos_id == t.pad_id == 259
    assert num_ids(manifest.tokenizer_entry(t)) == 261
    vocab = json.loads((gpt2 / "vocab.json").read_text())
    assert t.encode("the the") == [vocab["the"], vocab["Ġthe"]]
    for text in ("", " the\n\t ", "é 中文 😀 \x00", f"{published_toy.EOS} [MASK]"):
        ids = t.encode(text)
        assert t.decode(ids) == text and t.eos_id not in ids and t.mask_id not in ids
    assert t.decode([t.bos_id, *t.encode("the"), t.mask_id]) == "[EOS]the[MASK]"
    with pytest.raises(ValueError, match="token id 261 is not in 0..260"):
        t.decode([261])


def test_bert_has_a_mask_of_its_own(bert):
    t = wordpieces.read(bert)
    assert (t.kind, t.vocab_size, t.mask_id) == ("bert", 67, 4)
    assert (t.pad_id, t.bos_id, t.eos_id) == (0, 2, 3)
    assert num_ids(manifest.tokenizer_entry(t)) == 67
    ids = t.encode("Ab, [MASK] é")
    assert t.decode(ids) == "ab [UNK] [UNK] mask [UNK] e" and t.mask_id not in ids
    assert t.decode([t.bos_id, *t.encode("a"), t.mask_id, t.eos_id, t.pad_id]) == "a[MASK][EOS]"


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_every_form_is_the_same_tokenizer(request, kind, tmp_path):
    folder = request.getfixturevalue(kind)
    first = wordpieces.read(folder)
    saved = tmp_path / "saved"
    saved.mkdir()
    first.save(saved)
    forms = [saved, saved / "tokenizer.json"]
    forms += {
        "gpt2": [folder / "vocab.json", folder / "merges.txt"],
        "bert": [folder / "vocab.txt"],
    }[kind]
    old = json.loads((saved / "tokenizer.json").read_text())
    if kind == "gpt2":  # as older files have it: merges joined, <|endoftext|> added
        old["model"]["merges"] = [" ".join(merge) for merge in old["model"]["merges"]]
        eos = old["model"]["vocab"].pop(published_toy.EOS)
        old["added_tokens"] = [{"id": eos, "content": published_toy.EOS, "special": True}]
    (tmp_path / "old.json").write_text(json.dumps(old))
    forms.append(tmp_path / "old.json")
    for form in forms:
        again = tokenizer.read_tokenizer(form)
        assert manifest.tokenizer_entry(again) == manifest.tokenizer_entry(first)
        assert again.encode("the, quick") == first.encode("the, quick")
    assert tokenizer.load_tokenizer(saved).fingerprint == first.fingerprint


def test_another_vocabulary_is_another_tokenizer(gpt2, tmp_path):
    other = published_toy.write_gpt2(tmp_path / "other", MERGES[:2])
    assert wordpieces.read(gpt2).fingerprint != wordpieces.read(other).fingerprint


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_prepare(request, kind, tmp_path):
    folder = request.getfixturevalue(kind)
    lines = ['{"text": "the other cat, the end"}\n'] * 30
    text = str(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("".join(lines))
    data = dict(
        source="text", train=text, validation=text, test=text, holdout=0.4,
        text_field="text", tfds_dir="", **BEFORE, seq_len=8, packing="wrap", tokenizer=kind,
        tokenizer_path=str(folder), vocab_size=64,
    )  # fmt: skip
    config = ml_collections.ConfigDict({"data": data})
    made = build.prepare(config, tmp_path / "data", progress=False)
    assert made.load_tokenizer().fingerprint == made.tokenizer["fingerprint"]
    assert made.unigram_counts()[made.tokenizer["eos_id"]] > 0
    assert made.unigram_counts().shape == (made.vocab_size,)
    config.data.tokenizer_path = str(folder / ("vocab.txt" if kind == "bert" else "vocab.json"))
    build.prepare(config, tmp_path / "data", progress=False)  # the same, wherever it lies
    config.data.tokenizer_path = str(published_toy.write_gpt2(tmp_path / "third"))
    with pytest.raises(UserError, match="config.data.tokenizer_path="):
        build.prepare(config, tmp_path / "data", progress=False)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("tokenizer.json", "{", "not JSON"),
        ("tokenizer.json", "{}", "damaged"),
        ("tokenizer.json", '{"model": {"type": "Unigram", "vocab": []}}', "tokenizer, not Unigram"),
        (
            "tokenizer.json",
            '{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
            "tokenizer, not BPE",
        ),
        ("vocab.txt", "a\nb\n", r"must have \[PAD\], \[UNK\]"),
        ("vocab.json", "{}", "merges.txt: no such file"),
        ("other.bin", "", "holds no tokenizer: tokenizer.json, vocab.json with merges.txt"),
    ],
)
def test_bad_files(tmp_path, file, content, told):
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=told):
        wordpieces.read(tmp_path)


def test_gpt2_without_all_bytes(gpt2):
    vocab = json.loads((gpt2 / "vocab.json").read_text())
    (gpt2 / "vocab.json").write_text(json.dumps({k: i for i, k in enumerate(list(vocab)[9:])}))
    (gpt2 / "merges.txt").write_text("")
    with pytest.raises(UserError, match="must have a token for each of the 256 bytes"):
        wordpieces.read(gpt2)


def test_config_names_the_files(gpt2, bert):
    data = ml_collections.ConfigDict(
        dict(tokenizer="bert", tokenizer_path=str(bert), tokenizer_ids=0)
    )
    config = ml_collections.ConfigDict({"data": data})
    assert tokenizer.from_config(config, lambda: ()).kind == "bert"
    config.data.tokenizer_path = str(gpt2)
    with pytest.raises(UserError, match="must hold a bert tokenizer, not gpt2"):
        tokenizer.from_config(config, lambda: ())
    config.data.tokenizer_path = ""
    with pytest.raises(UserError, match="must name the files of the bert tokenizer"):
        tokenizer.from_config(config, lambda: ())


def test_sizes_planned_are_those_published():
    for kind, sizes in (("gpt2", (50257, 50257, 50258)), ("bert", (30522, 103, 30522))):
        config = ml_collections.ConfigDict({"data": dict(tokenizer=kind, vocab_size=1024)})
        entry = planned_tokenizer(config)
        assert (entry["vocab_size"], entry["mask_id"], num_ids(entry)) == sizes
