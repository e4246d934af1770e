"""Infilling keeps the known text: random texts with random spans, for each kind of tokenizer.

`run()` fills the spans with random ids, including specials, and compares the decoded text around
them with the given text. A text is `exact`, `refused` (the tokenizer cannot spell a character; the
error names it) or `changed`, which is a fault. No model is needed.
"""

import collections
import functools
import io
import itertools
import json
import random
import string
from collections.abc import Callable

import sentencepiece

from esolm_jax.data import tokenizer as tokenizer_lib
from esolm_jax.data.hub_tokenizer import HubTokenizer
from esolm_jax.data.wordpieces import WordPieces
from esolm_jax.errors import UserError
from esolm_jax.sampling.plan import prompts
from esolm_jax.sampling.plan.canvas import MASK

CORPUS = [
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer",
    "the slings and arrows of outrageous fortune, or to take arms against a sea of troubles",
    "and by opposing end them. To die - to sleep, no more; and by a sleep to say we end",
    "le cœur a ses raisons que la raison ne connaît point; où est la bibliothèque, señor?",
    "Über allen Gipfeln ist Ruh, in allen Wipfeln spürest du kaum einen Hauch (1780).",
    "春眠不觉晓 处处闻啼鸟 夜来风雨声 花落知多少 いろはにほへと ちりぬるを",
    "x = [1, 2.5, -3]  # don't: it's 10% of $7 & more @ home / abroad + \"quoted\" <tag>",
    "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG while 0123456789 zebras vex a quiet jackal!",
] * 20
WORDS = [word for line in CORPUS[:3] for word in line.split()]
WILD = [
    *("  ", "   ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2003", "\u2028", "\u200b", "\u200d"),
    *("\u2581", "\u2581\u2581", "a\u2581b", "Ġ", "##", "▁the", "<s>", "</s>", "<unk>", "[UNK]"),
    *("[EOS]", "<0x41>", "[CLS]", "é", "e\u0301", "ﬁ", "ﬃ", "①", "Ａ", "ß", "İ", "ǆ", "중", "한국"),
    *("中文", "春眠", "😀", "👩\u200d👩\u200d👧", "\ufffd", "\x00", "\x1b", "\ufeff", "\ue000"),
    *("n't", "...", "?!", ",", ".", "'", '"', "-", "--", "0", "123", "<|endoftext|>", "\\n"),
    *("½", "…", "“", "'s"),
]  # fmt: skip


def plain(rng: random.Random) -> str:
    """Words of the corpus with single spaces."""
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))


def lower(rng: random.Random) -> str:
    """Lower-case words without punctuation."""
    kept = "".join(c for c in plain(rng).lower() if c in string.ascii_lowercase + " ")
    return " ".join(kept.split())


def wild(rng: random.Random) -> str:
    """White space of all kinds, normalised or rare characters, specials, symbols."""
    parts = []
    for _ in range(rng.randint(1, 10)):
        kind = rng.random()
        if kind < 0.45:
            parts.append(rng.choice(WORDS))
        elif kind < 0.6:
            parts.append(" ")
        elif kind < 0.95:
            parts.append(rng.choice(WILD))
        else:
            parts.append(chr(rng.choice([*range(0x20, 0x250), *range(0x4E00, 0x4E40)])))
    return "".join(parts)


TEXTS = (plain, lower, wild)  # in rotation


def _sentencepiece(**options) -> tokenizer_lib.SentencePiece:
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=proto, minloglevel=2, num_threads=1, **options
    )
    return tokenizer_lib.SentencePiece(proto.getvalue())


def _hub(model, trainer, *, normalizer=None, pre_tokenizer=None, decoder=None) -> HubTokenizer:
    import tokenizers

    made = tokenizers.Tokenizer(model)
    for name, part in [
        ("normalizer", normalizer),
        ("pre_tokenizer", pre_tokenizer),
        ("decoder", decoder),
    ]:
        if part is not None:
            setattr(made, name, part)
    made.train_from_iterator(CORPUS, trainer)
    size = made.get_vocab_size()
    ids = {"vocab_size": size + 3, "bos": 1, "eos": 2, "pad": 2}  # 3 ids are none of its tokens
    return HubTokenizer(made.to_str().encode(), ids)


SPECIALS = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{b:02X}>" for b in range(256)]


def _llama() -> HubTokenizer:
    """Llama 2's: a space in front by the normaliser, and byte fallback."""
    from tokenizers import decoders, models, normalizers, trainers

    return _hub(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIALS + _BYTES, show_progress=False),
        normalizer=normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        ),
        decoder=decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
    )


def _metaspace(scheme: str) -> HubTokenizer:
    from tokenizers import decoders, models, pre_tokenizers, trainers

    return _hub(
        models.BPE(unk_token="<unk>"),
        trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIALS, show_progress=False),
        pre_tokenizer=pre_tokenizers.Metaspace("\u2581", prepend_scheme=scheme),
        decoder=decoders.Metaspace("\u2581", prepend_scheme=scheme),
    )


def _t5() -> HubTokenizer:
    """T5's: Unigram, white space and compatibility characters normalised."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

    return _hub(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=400, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
        ),
        normalizer=normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
        ),
        pre_tokenizer=pre_tokenizers.Metaspace("\u2581", prepend_scheme="always"),
        decoder=decoders.Metaspace("\u2581", prepend_scheme="always"),
    )


def _byte_level(add_prefix_space: bool) -> HubTokenizer:
    from tokenizers import decoders, models, pre_tokenizers, trainers

    return _hub(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space),
        decoder=decoders.ByteLevel(),
    )


def _gpt2() -> WordPieces:
    made = json.loads(_byte_level(False).content)
    vocab = made["model"]["vocab"]
    vocab["<|endoftext|>"] = len(vocab)
    merges = [tuple(merge) for merge in made["model"]["merges"]]
    return WordPieces("gpt2", vocab, merges, lowercase=False)


def _bert(lowercase: bool) -> WordPieces:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return WordPieces("bert", made.get_vocab(), [], lowercase=lowercase)


_BPE = {"model_type": "bpe", "vocab_size": 500}
KINDS: dict[str, Callable[[], object]] = {
    "bytes": tokenizer_lib.Bytes,
    "SentencePiece, own training": lambda: tokenizer_lib.train_sentencepiece(CORPUS, 500),
    "SentencePiece, defaults (nmt_nfkc, dummy prefix)": lambda: _sentencepiece(vocab_size=180),
    "SentencePiece, defaults and byte fallback": lambda: _sentencepiece(
        vocab_size=430, byte_fallback=True
    ),
    "SentencePiece, Llama (identity, dummy prefix)": lambda: _sentencepiece(
        **_BPE, normalization_rule_name="identity", remove_extra_whitespaces=False,
        byte_fallback=True,
    ),
    "SentencePiece, identity, no prefix": lambda: _sentencepiece(
        **_BPE, normalization_rule_name="identity", add_dummy_prefix=False
    ),
    "SentencePiece, white space as suffix": lambda: _sentencepiece(
        **_BPE, treat_whitespace_as_suffix=True, byte_fallback=True
    ),
    "hub, Llama (Prepend)": _llama,
    "hub, Metaspace first": functools.partial(_metaspace, "first"),
    "hub, Metaspace always": functools.partial(_metaspace, "always"),
    "hub, Metaspace never": functools.partial(_metaspace, "never"),
    "hub, T5 (Unigram, NFKC)": _t5,
    "hub, ByteLevel": functools.partial(_byte_level, False),
    "hub, ByteLevel, add_prefix_space": functools.partial(_byte_level, True),
    "gpt2": _gpt2,
    "bert, uncased": functools.partial(_bert, True),
    "bert, cased": functools.partial(_bert, False),
}  # fmt: skip


def _spans(rng: random.Random, text: str) -> list[list[int]]:
    """Ascending spans of characters, some of them empty, adjacent, at the start or the end."""
    cuts = sorted(rng.randint(0, len(text)) for _ in range(2 * rng.randint(0, 3)))
    return [list(pair) for pair in zip(cuts[::2], cuts[1::2], strict=True)]


def _request(rng: random.Random, text: str, tokenizer):
    """(known parts, Prompt) of a text: a span is replaced by masks, or rewritten."""
    spans = _spans(rng, text)
    if rng.random() < 0.3 and (wanted := [span for span in spans if span[0] < span[1]]):
        ends = [0, *(at for span in wanted for at in span), len(text)]
        known = [text[a:b] for a, b in zip(ends[::2], ends[1::2], strict=True)]
        return known, lambda: prompts.parse_rewrite(text, wanted, tokenizer)
    ends = [0, *(at for span in spans for at in span), len(text)]
    known = [text[a:b] for a, b in zip(ends[::2], ends[1::2], strict=True)]
    asked = known[0] + "".join(f"[MASK:{rng.randint(1, 4)}]{part}" for part in known[1:])
    return known, lambda: prompts.parse_text(asked, tokenizer)


def kept(tokens, known: list[str], tokenizer, rng: random.Random) -> bool:
    """Whether the text keeps the known parts for random values of the masked tokens."""
    specials = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    ids = [specials, range(tokenizer.vocab_size), range(tokenizer.vocab_size)]
    filled = [rng.choice(rng.choice(ids)) if i == MASK else i for i in tokens]
    filled = [0 if i == tokenizer.mask_id else i for i in filled]
    given = {"bos_is_given": not tokens or tokens[0] != MASK}
    pieces = tokenizer.pieces(filled, **given)
    runs = itertools.groupby(zip(tokens, pieces, strict=True), lambda pair: pair[0] == MASK)
    found = ["".join(piece for _, piece in run) for is_mask, run in runs if not is_mask]
    is_whole = "".join(pieces) == tokenizer.decode(filled, **given)
    return is_whole and found == [part for part in known if part]


def check(name: str, texts: int = 1000, seed: int = 0) -> dict:
    """One kind: counts, and counts of refusals by reason."""
    rng, tokenizer = random.Random(seed), KINDS[name]()
    counts, reasons = collections.Counter(), collections.Counter()
    for n in range(texts):
        text = TEXTS[n % len(TEXTS)](rng)
        known, make = _request(rng, text, tokenizer)
        try:
            prompt = make()
        except UserError as error:
            counts["refused"] += 1
            reasons[str(error).split(", must be kept")[0].split(", ", 1)[-1]] += 1
            continue
        counts["exact" if kept(prompt.tokens, known, tokenizer, rng) else "changed"] += 1
    return {
        "kind": name,
        "texts": texts,
        **{outcome: counts[outcome] for outcome in ("exact", "refused", "changed")},
        "refused_for": dict(reasons.most_common(5)),
    }


def run(texts: int = 1000) -> list[dict]:
    """A row for each kind of tokenizer: kind, texts, exact, refused, changed, refused_for."""
    return [check(name, texts) for name in KINDS]


if __name__ == "__main__":
    for row in run():
        print(row)
