"""Detokenizers, tokenizers and windows are exactly those of the published code."""

import hashlib

import numpy as np
import pytest
from golden_eval import FOLDER, read_json

from esolm_jax.data import published_tokenizers
from esolm_jax.errors import UserError
from esolm_jax.evaluation import protocol

NAMES = {"wt": "wikitext"}  # in the vectors → in the published code
DETOKENIZERS = ("wt", "ptb", "lm1b", "lambada", "scientific_papers")
GOLDEN = read_json("windows.json")
DOCUMENTS = GOLDEN["documents"] | {"hollow": [""] * 1000 + GOLDEN["documents"]["small"]}
BPE, WORDPIECE = FOLDER / "tokenizer_bpe", FOLDER / "tokenizer_wordpiece"
TOKENIZERS = {"bpe": BPE, "wordpiece": WORDPIECE, "text8": "text8"}


@pytest.mark.parametrize("name", DETOKENIZERS)
def test_detokenizer(name):
    pairs = read_json("detok.json")[name]
    found = [protocol.detokenize(NAMES.get(name, name), text) for text, _ in pairs]
    assert found == [text for _, text in pairs]


def test_detokenizer_by_name():
    text, wikitext, lm1b = "x @-@ y .", "x-y .", "x @-@ y ."
    assert protocol.detokenize("wikitext103", text) == wikitext
    assert protocol.detokenize("scientific_papers_pubmed", text) == protocol.detokenize(
        "lm1b", wikitext
    )
    for name in ("openwebtext-valid", "ag_news", "text8-crop", "none"):
        assert protocol.detokenize(name, lm1b) == lm1b
    with pytest.raises(UserError, match=r"dataset='lmb1': .* \(did you mean 'lm1b'\?\)"):
        protocol.detokenize("lmb1", text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer(name):
    tokenizer = published_tokenizers.read(TOKENIZERS[name])
    expected = GOLDEN["tokenizers"][name]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (expected["window_bos"], expected["window_eos"])
    if name == "text8":
        texts, ids = zip(*GOLDEN["text8_tokenizer"]["cases"], strict=True)
    else:
        assert tokenizer.padding.pad_id == expected["pad_token_id"]
        texts, *both = zip(*GOLDEN["document_tokens_small"], strict=True)
        ids = both[name == "wordpiece"]
    assert tokenizer.encode_batch(list(texts)) == list(ids)


def windows_of(case) -> tuple[np.ndarray, np.ndarray]:
    name = case["documents"]
    if name == "text8":
        documents = GOLDEN["text8"][case["mode"]]
    elif isinstance(name, list):
        documents = DOCUMENTS[name[0]][name[1] : name[2]]
    else:
        documents = DOCUMENTS[name]
    fields = ("dataset", "wrap", "insert_eos", "insert_special_tokens", "block_size", "num_proc")
    settings = protocol.WindowSettings(
        **{field: case[field] for field in fields}, split=case["mode"]
    )
    return protocol.windows_with_mask(documents, TOKENIZERS[case["tokenizer"]], settings)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["id"])
def test_windows(case):
    ids, mask = windows_of(case)
    assert ids.dtype == mask.dtype == np.int32 and ids.shape == mask.shape
    if "error" in case:  # of `datasets`; ours are the windows by the rules
        assert ids.tolist() == case["windows_if_it_had_not_failed"]
        return
    assert len(ids) == case["count"]
    if case["count"]:
        assert ids.shape[1] == case["length"]
        assert hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest() == case["sha256"]
    scored = case["tokens"]["scored"], case["tokens"]["scored_without_first"]
    assert (mask.sum(), mask.sum() - len(mask)) == scored
    if "windows" in case:
        assert ids.tolist() == case["windows"]
    else:
        assert case["count"] == 0 or [ids[i].tolist() for i in (0, -1)] == [
            case["first"],
            case["last"],
        ]
    assert mask.tolist() == case.get("attention_mask", np.ones_like(ids).tolist())


def test_windows_are_the_first_of_windows_with_mask():
    settings = {"dataset": "lm1b", "wrap": False, "insert_eos": True, "block_size": 12}
    texts = DOCUMENTS["small"]
    ids, _ = protocol.windows_with_mask(texts, WORDPIECE, protocol.WindowSettings(**settings))
    np.testing.assert_array_equal(protocol.windows(iter(texts), WORDPIECE, **settings), ids)


def test_number_of_windows_depends_on_the_number_of_processes():
    """The fault that `num_proc` reproduces: a small set loses text, then all of it."""
    counts = [
        len(protocol.windows(DOCUMENTS["mid"], BPE, dataset="ptb", block_size=256, num_proc=n))
        for n in (1, 4, 47)
    ]
    assert counts[0] > counts[1] > counts[2] == 0


def test_text8_documents_may_be_given_in_parts():
    whole = GOLDEN["text8"]["test"]
    parts = [whole[start : start + 7] for start in range(0, len(whole), 7)]
    settings = {"dataset": "text8", "block_size": 20}
    np.testing.assert_array_equal(
        protocol.windows(parts, "text8", **settings), protocol.windows(whole, "text8", **settings)
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_size": 2}, "block_size=2: must be at least 3"),
        ({"num_proc": 0}, "num_proc=0: must be at least 1"),
        ({"dataset": "wiki"}, "dataset='wiki': must be one of"),
        ({"documents": "one text"}, "documents: must be several texts"),
        ({"tokenizer": "text8", "wrap": False}, "wrap=False: must be True with the text8"),
        ({"tokenizer": FOLDER}, "holds no tokenizer"),
    ],
)
def test_bad_arguments(change, message):
    settings = {"documents": ["a"], "tokenizer": BPE, "dataset": "none"} | change
    with pytest.raises(UserError, match=message):
        protocol.windows(settings.pop("documents"), settings.pop("tokenizer"), **settings)
