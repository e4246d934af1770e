"""Tokenizers: lossless, deterministic, and clear about what they refuse."""

import io

import ml_collections
import pytest
import sentencepiece

from esolm_jax.data.tokenizer import (
    Bytes,
    SentencePiece,
    from_config,
    load_tokenizer,
    train_sentencepiece,
)
from esolm_jax.errors import UserError

CORPUS = ["Shall I compare thee to a summer's day?\n  Thou art  more lovely,\tand é.\n"] * 50
TEXTS = [
    "",
    " ",
    "\n",
    "  two  spaces \n\n\t tab\r\n end  ",
    "emoji 😀👩‍👩‍👧 ﬁ e\u0301 中文 \u2028 \x00\x01 \ufffd",
    "\u2581the sign\u2581\u2581 for a space \u2581",
    "<s> </s> <unk> <pad> <0x41> [MASK] [EOS]",
    "".join(map(chr, range(0x20, 0x2FF))),
]


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(request):
    return Bytes() if request.param == "bytes" else train_sentencepiece(CORPUS, 300)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)


def test_specials(tokenizer):
    t = tokenizer
    assert t.mask_id == t.vocab_size and len({t.bos_id, t.eos_id, t.pad_id, t.mask_id}) == 4
    ids = [t.bos_id, *t.encode("a b"), t.mask_id, *t.encode(" c"), t.eos_id, t.pad_id, t.pad_id]
    assert t.decode(ids) == "a b[MASK] c[EOS]"
    for bad in (-1, t.mask_id + 1):
        with pytest.raises(ValueError, match=f"token id {bad}"):
            t.decode([bad])


def test_save_and_load(tokenizer, tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.kind, loaded.fingerprint) == (tokenizer.kind, tokenizer.fingerprint)
    assert loaded.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])


def test_training_is_deterministic_and_compresses():
    one, two = (train_sentencepiece(iter(CORPUS), 310) for _ in range(2))
    assert one.fingerprint == two.fingerprint and one.vocab_size == 310
    assert len(one.encode(CORPUS[0])) < len(CORPUS[0]) * 0.8
    assert one.encode("\n\n") == one.encode("\n") * 2 and len(one.encode("\n")) == 1


@pytest.mark.parametrize("vocab_size", [0, 100, 50_000])
def test_refused_vocab_size(vocab_size):
    with pytest.raises(UserError, match=f"config.data.vocab_size={vocab_size}: .*refuses"):
        train_sentencepiece(CORPUS, vocab_size)


def given_model(path, **options):
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=proto, vocab_size=29, minloglevel=2, **options
    )
    path.write_bytes(proto.getvalue())
    data = dict(tokenizer="sentencepiece", tokenizer_path=str(path), vocab_size=7)
    return ml_collections.ConfigDict({"data": data})


def test_given_model(tmp_path):
    config = given_model(tmp_path / "a.model")
    tokenizer = from_config(config, lambda: pytest.fail("must not train"))
    assert tokenizer.vocab_size == 29 and tokenizer.pad_id == tokenizer.eos_id  # it has no PAD
    assert tokenizer.decode([*tokenizer.encode("thee"), tokenizer.eos_id]) == "thee[EOS]"
    with pytest.raises(UserError, match="config.data.tokenizer_path=.*: must have a BOS"):
        from_config(given_model(tmp_path / "b.model", bos_id=-1), lambda: ())
    config.data.tokenizer_path = str(tmp_path / "none.model")
    with pytest.raises(UserError, match="config.data.tokenizer_path=.*no such file"):
        from_config(config, lambda: ())
    with pytest.raises(UserError, match="not a SentencePiece model"):
        SentencePiece(b"nonsense")
    config.data.tokenizer = "byte"
    with pytest.raises(UserError, match="did you mean 'bytes'"):
        from_config(config, lambda: ())
