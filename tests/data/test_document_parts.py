"""Long documents are tokenized in parts: the same tokens, in little memory."""

import json
import random
import tracemalloc

import pytest
from text_config import config

from esolm_jax.data import build, document_parts
from esolm_jax.data.tokenizer import Bytes, train_sentencepiece

WORDS = ["to", "be,", "or", "not", "naïve", "日本語", "x" * 30, "don't", "1234", "😀", "\u2581a"]


def text_of(rng, count: int) -> str:
    spaces = [" ", " ", " ", "  ", "\n", "\n\n", "\t", " \n ", "\u00a0"]
    return "".join(rng.choice(WORDS) + rng.choice(spaces) for _ in range(count))


def tokenizer_of(kind: str):
    """Of each way to treat the space before a word."""
    text = text_of(random.Random(1), 4000)
    if kind == "bytes":
        return Bytes()
    if kind == "sentencepiece":
        return train_sentencepiece([text], 300)
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE(byte_fallback=kind == "llama"))
    if kind == "llama":
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        made.decoder = decoders.Replace("▁", " ")
    elif kind == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix")
    alphabet = pre_tokenizers.ByteLevel.alphabet() if "pre" in kind or kind == "gpt2" else []
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False, initial_alphabet=alphabet,
        special_tokens=[f"<0x{i:02X}>" for i in range(256)] if kind == "llama" else [],
    )  # fmt: skip
    made.train_from_iterator(text.split("\n") if kind == "llama" else [text], trainer)

    class Hub:
        def encode(self, text):
            return made.encode(text, add_special_tokens=False).ids

    Hub.kind = "tokenizers"
    return Hub()


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "gpt2", "prefix", "metaspace", "llama"])
def test_parts_have_the_tokens_of_the_whole(monkeypatch, kind):
    tokenizer = tokenizer_of(kind)
    monkeypatch.setattr(document_parts, "PART", 500)
    monkeypatch.setattr(document_parts, "MAX_WORD", 2000)
    for seed in range(20):
        text = text_of(random.Random(seed), 800)
        parts = list(document_parts.encode(tokenizer, text))
        assert len(parts) > 4
        assert sum(parts, []) == tokenizer.encode(text)


def test_a_short_document_is_one_part():
    class Tokenizer:
        kind = "any"

        def encode(self, text):
            return [text]

    assert list(document_parts.encode(Tokenizer(), "a b c")) == [["a b c"]]


def test_a_word_without_an_end_is_cut(monkeypatch):
    monkeypatch.setattr(document_parts, "PART", 100)
    monkeypatch.setattr(document_parts, "MAX_WORD", 400)
    tokenizer = tokenizer_of("sentencepiece")
    parts = list(document_parts.encode(tokenizer, "x" * 1000))
    assert [len(tokenizer.decode(part)) for part in parts] == [400, 400, 200]


@pytest.mark.parametrize("packing", ["wrap", "pad"])
def test_a_long_document_needs_little_memory(tmp_path, packing):
    """A list of the tokens of all of it would take 100 MB."""
    size = 12_000_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "word " * (size // 5)}) + "\n")
    (tmp_path / "b.txt").write_text("other")
    other = str(tmp_path / "b.txt")
    given = config(
        tmp_path / "a.jsonl", validation=other, test=other, seq_len=4096, packing=packing
    )
    tracemalloc.start()
    manifest = build.prepare(given, tmp_path / "data", progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * size
    if packing == "wrap":
        assert manifest.splits["train"]["bytes"] == size
        assert manifest.splits["train"]["tokens"] == size + 1
