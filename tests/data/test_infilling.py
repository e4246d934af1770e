"""Known text is kept exactly, independent of the tokenizer and of the generated text."""

import functools
import json
import random
import tracemalloc
import types

import numpy as np
import pytest
import tiny_run

from benchmarks.reliability import infilling
from esolm_jax.config import default_config
from esolm_jax.data import known_text
from esolm_jax.errors import UserError
from esolm_jax.sampling import texts
from esolm_jax.sampling.plan import prompts
from esolm_jax.sampling.plan.canvas import MASK, Canvas, Seed

pytestmark = pytest.mark.fast_compile

KINDS = list(infilling.KINDS)
PREFIXED = [  # tokenizers that put a space in front of a text
    kind
    for kind in KINDS
    if any(sign in kind for sign in ("Llama", "defaults", "first", "always", "T5", "add_prefix"))
]
# Of 1 000 texts; those without these are lossless. A third of the texts is wild, and BERT's tokens
# bring their own spaces.
LEAST_EXACT = {"bert, uncased": 400, "bert, cased": 400} | dict.fromkeys(
    [
        "SentencePiece, defaults (nmt_nfkc, dummy prefix)",
        "SentencePiece, identity, no prefix",
        "hub, Metaspace first",
        "hub, Metaspace always",
        "hub, Metaspace never",
        "hub, T5 (Unigram, NFKC)",
    ],
    700,
)


@functools.cache
def tokenizer_of(kind: str):
    return infilling.KINDS[kind]()


@pytest.mark.parametrize("kind", KINDS)
def test_random_texts_with_random_spans_are_kept_or_refused(kind):
    row = infilling.check(kind, texts=1000)
    assert row["changed"] == 0
    assert row["exact"] + row["refused"] == 1000
    assert row["exact"] >= LEAST_EXACT.get(kind, 1000), row


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_is_that_of_the_library(kind):
    """Of runs without specials: only where a text begins, and of bytes that are no UTF-8, is it
    more careful."""
    tokenizer, rng = tokenizer_of(kind), random.Random(0)
    if kind == "bytes":
        return
    surfaces = tokenizer.surfaces
    cut = [i for i, data in enumerate(surfaces.inside) if not data.isascii()]
    ids = [i for i, spells in enumerate(surfaces.spells) if spells and i not in cut]
    words = [i for i in ids if surfaces.first[i].isalnum()]
    for _ in range(200):
        run = [rng.choice(words), *rng.choices(ids, k=rng.randint(0, 8))]
        library = tokenizer._library_text(run)
        if "add_prefix" in kind:
            library = library.removeprefix(" ")
        assert tokenizer.decode(run) == library
    for text in ("to be, or not", "le cœur"):
        if "bert" not in kind and "suffix" not in kind:
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", PREFIXED)
def test_no_space_is_added_to_a_part(kind):
    tokenizer = tokenizer_of(kind)
    x = tokenizer.surfaces.by_bytes[b"x"]
    for text, wanted in [("to be[MASK] not", "to bex not"), ("n[MASK]t", "nxt"),
                         ("[MASK]t", "xt"), ("[MASK] t", "x t"), ("a [MASK]", "a x")]:  # fmt: skip
        tokens = prompts.parse_text(text, tokenizer).tokens
        filled = [x if i == MASK else i for i in tokens]
        assert tokenizer.decode(filled) == wanted


@pytest.mark.parametrize("kind", PREFIXED)
def test_parts_have_the_tokens_that_the_text_has(kind):
    """So that the model reads what it was trained on."""
    tokenizer = tokenizer_of(kind)
    whole = tokenizer.encode("to be or not to sleep")
    stop = len(tokenizer.encode("to be"))
    tokens = prompts.parse_text("to be[MASK] not to sleep", tokenizer).tokens
    if "hub, Llama" not in kind:  # without pre-tokens, its merges cross the spaces
        end = len(tokens) - stop - 1
        assert list(tokens) == [*whole[:stop], MASK, *whole[len(whole) - end :]]
    assert list(prompts.parse_text("to be or not to sleep", tokenizer).tokens) == whole


def test_the_marker_of_a_space_is_kept_in_bytes():
    for kind in ("SentencePiece, Llama (identity, dummy prefix)", "hub, Llama (Prepend)"):
        tokenizer = tokenizer_of(kind)
        tokens = prompts.parse_text("a\u2581b", tokenizer).tokens
        assert tokenizer.decode(tokens) == "a\u2581b"


def test_stray_bytes_do_not_spoil_what_is_known():
    """A decoder with byte fallback gives up on a whole run of bytes."""
    tokenizer = tokenizer_of("hub, Llama (Prepend)")
    tokens = prompts.parse_text("[MASK]한[MASK]", tokenizer).tokens
    stray = tokenizer.surfaces.by_bytes[b"\xe4"]
    filled = [stray if i == MASK else i for i in tokens]
    assert tokenizer.decode(filled) == "\ufffd한\ufffd"
    assert "한" not in tokenizer._library_text(filled)


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        ("hub, Metaspace first", "a☃[MASK]", "character 1, '☃' (U+2603), must be kept"),
        ("SentencePiece, identity, no prefix", "[MASK]\n", "character 6, '\\n' (U+000A)"),
        ("bert, uncased", "to Be[MASK]", "of 'to Be' it would make 'to be'"),
        ("bert, cased", "to be [MASK]", "leave it out: the token in place of [MASK]"),
    ],
)
def test_what_a_tokenizer_cannot_spell_is_named(kind, text, told):
    with pytest.raises(UserError) as error:
        prompts.parse_text(text, tokenizer_of(kind), name="here")
    assert str(error.value).startswith("here: ") and told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_decoder_that_is_no_concatenation_is_refused():
    from tokenizers import decoders

    tokenizer = infilling._llama()
    tokenizer._tokenizer.decoder = decoders.BPEDecoder("\u2581")  # but not of the last token
    assert tokenizer.surfaces is None
    with pytest.raises(UserError, match="must be kept as it is"):
        prompts.parse_text("a[MASK]", tokenizer)
    assert prompts.parse_text("[MASK:3]", tokenizer).tokens == (MASK,) * 3


@pytest.mark.parametrize("kind", ["SentencePiece, own training", PREFIXED[0], "bytes"])
def test_a_span_has_as_many_tokens_as_it_has_in_the_text(kind):
    tokenizer = tokenizer_of(kind)
    text = "to be or not to sleep"
    ids = known_text.encode(tokenizer, text, begins=True, limit=100)
    spans = known_text.spans(tokenizer, text, ids)
    for start in range(len(text)):
        for stop in range(start + 1, len(text) + 1):
            tokens = prompts.parse_rewrite(text, [[start, stop]], tokenizer).tokens
            wanted = sum(a < stop and b > start for a, b in spans)
            assert tokens.count(MASK) == wanted > 0
    # A span that is rewritten need not be spelled.
    tokens = prompts.parse_rewrite("to ☃ be", [[3, 4]], tokenizer_of("hub, Metaspace first")).tokens
    assert MASK in tokens


def printed(kind: str, prompt: str, generated: list[int], packing: str) -> str:
    """What `sample` prints of a prompt whose masks become these ids."""
    tokenizer, config = tokenizer_of(kind), default_config()
    config.sample.num_texts, config.data.packing = 1, packing
    request = prompts.parse_text(prompt, tokenizer)
    ids, rest = [], iter(generated)
    for token in request.tokens:
        ids.append(next(rest) if token == MASK else token)
    canvas = Canvas.of(
        [request.tokens], [Seed(0, 0)], vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id
    )
    generator = types.SimpleNamespace(
        schedule=types.SimpleNamespace(length=[len(ids)]),
        canvas=canvas,
        order=lambda _: np.arange(len(ids))[None],
    )
    decoded = types.SimpleNamespace(text=np.array([ids]), eos_position=np.array([2**31 - 1]))
    rows = texts.sample_rows(config, generator, decoded, tokenizer, prompted=True)
    return rows[0]["text"]


@pytest.mark.parametrize("kind", ["bytes", *PREFIXED])
def test_specials_that_are_generated_take_nothing_from_what_is_known(kind):
    t = tokenizer_of(kind)
    for packing in ("wrap", "pad"):
        assert printed(kind, "to[MASK] be", [t.eos_id], packing) == "to[EOS] be"
        shown = "[EOS]" if t.pad_id == t.eos_id else ""
        assert printed(kind, "[MASK] be", [t.pad_id], packing) == f"{shown} be"
        assert printed(kind, "[MASK] be", [t.bos_id], packing) == " be"
    x = t.surfaces.by_bytes[b"x"]
    # With one document a window, what was generated behind the EOS that closes it is not shown.
    assert printed(kind, "to[MASK] be[MASK:2]", [t.eos_id, t.eos_id, x], "pad") == "to[EOS] be"


def test_a_prompt_with_a_long_canvas_is_bounded():
    """Hostile text, each character of which is spelled by itself: no work is done twice."""
    tokenizer = tokenizer_of("SentencePiece, Llama (identity, dummy prefix)")
    text = "▁  ﬁ" * 500
    ids = known_text.encode(tokenizer, text, begins=True, limit=10**6)
    assert tokenizer.decode(ids) == text
    with pytest.raises(known_text.TooLong):
        known_text.encode(tokenizer, text, begins=True, limit=100)


def test_samples_of_a_model_whose_tokenizer_puts_a_space_first(tmp_path):
    """The whole way: the texts that `sample` writes hold what was known, and only that."""
    tokenizer = tokenizer_of("SentencePiece, Llama (identity, dummy prefix)")
    model = tmp_path / "a.model"
    model.write_bytes(tokenizer.proto)
    fields = {"data.tokenizer": "sentencepiece", "data.tokenizer_path": str(model)}
    fields |= tiny_run.write_data(tmp_path, **fields)
    fields |= {"objective": "eso_b", "train.steps": 1}
    args = [f"--workdir={tmp_path}", f"--config={tiny_run.FILE}", *tiny_run.arguments(fields)]
    assert tiny_run.command("train", *args) == 0
    known = ["to be", " not", "t\u2581 "]
    asked = f"--prompt={known[0]}[MASK:2]{known[1]}[MASK]{known[2]}"
    options = ["--config.sample.num_texts=32", "--config.sample.stop_at_eos=True"]
    assert tiny_run.command("sample", f"--workdir={tmp_path}", asked, *options) == 0
    sizes = [len(known_text.encode(tokenizer, part, begins=not n, limit=99))
             for n, part in enumerate(known)]  # fmt: skip
    first, second = sizes[0], sizes[0] + 2 + sizes[1]
    x = tokenizer.surfaces.by_bytes[b"x"]
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 32
    for row in map(json.loads, lines):
        ids = row["token_ids"]
        spans = [
            tokenizer.decode([x, *ids[at : at + n]])[1:] for at, n in [(first, 2), (second, 1)]
        ]
        assert row["text"] == known[0] + spans[0] + known[1] + spans[1] + known[2]


BOUND = 64
HOSTILE = {
    "masks": "[MASK]" * 500_000,
    "large masks": "[MASK:999999]" * 3_000,
    "open masks": "[MASK:" * 500_000,
    "one word": "x" * 3_000_000,
    "spaces": " " * 3_000_000,
    "markers": "\u2581" * 1_000_000,
    "unknown": "☃" * 1_000_000,
}


@pytest.mark.parametrize("kind", ["SentencePiece, defaults and byte fallback", *KINDS[-10:]])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_prompts_are_refused_before_they_are_made(kind, name):
    """Within memory that one list of their masks would not fit in."""
    tokenizer = tokenizer_of(kind)
    tokenizer.surfaces  # noqa: B018
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            prompts.parse_text(HOSTILE[name], tokenizer, name="here", length=BOUND)
        with pytest.raises(UserError):
            spans = [[i, i + 1] for i in range(BOUND + 1)]
            prompts.parse_rewrite(HOSTILE[name], spans, tokenizer, name="here", length=BOUND)
        assert len(str(error.value)) < 400
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()
