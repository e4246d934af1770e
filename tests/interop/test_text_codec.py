"""Shipped Python code encodes prompts and decodes ids as our tokenizers do, without them."""

import io
import json
import pathlib
import shutil
import subprocess
import sys
import types

import pytest
import sentencepiece
import tokenizer_kinds
from tokenizer_kinds import KINDS, LENGTH, tokenizer_of

from benchmarks.reliability import infilling
from esolm_jax.data import known_text, mask_spans
from esolm_jax.data.tokenizer import SentencePiece
from esolm_jax.errors import UserError
from esolm_jax.interop.export import vocabulary
from esolm_jax.interop.export.shipped import options, text_codec
from esolm_jax.sampling.plan import prompts

SHIPPED = pathlib.Path(text_codec.__file__).parent
TEXTS, IDS, PROMPTS = 300, 300, 60
WITHOUT_LIBRARY = ["bytes", "SentencePiece, own training", "hub, ByteLevel", "gpt2", "text8"]


@pytest.fixture(scope="module")
def codecs(tmp_path_factory):
    base = tmp_path_factory.mktemp("vocabularies")
    folders = (tokenizer_kinds.write(kind, base / str(n)) for n, kind in enumerate(KINDS))
    return dict(zip(KINDS, map(text_codec.load, folders), strict=True))


def specials(tokenizer) -> list[int]:
    return [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id]


def encoded(function, text: str, begins: bool):
    """Ids, or the index of the character that cannot be kept."""
    try:
        return function(text, begins=begins)
    except known_text.NotKept as error:
        return error.at


# As our tokenizers.


@pytest.mark.parametrize("kind", KINDS)
def test_decodes_any_ids(codecs, kind):
    codec, tokenizer = codecs[kind], tokenizer_of(kind)
    assert codec.mask_id == tokenizer.mask_id
    for ids, given in tokenizer_kinds.random_ids(codec.num_ids, specials(tokenizer), IDS):
        wanted = tokenizer.decode(ids, bos_is_given=given)
        assert codec.decode(ids, bos_is_given=given) == wanted
    with pytest.raises(ValueError, match="is not in 0"):
        codec.decode([codec.num_ids])


@pytest.mark.parametrize("kind", KINDS)
def test_encodes_known_text(codecs, kind):
    def ours(text, begins):
        return known_text.encode(tokenizer_of(kind), text, begins=begins, limit=10**6)

    for text, begins in tokenizer_kinds.texts(TEXTS):
        wanted = encoded(ours, text, begins)
        assert encoded(codecs[kind].encode, text, begins) == wanted, text


@pytest.mark.parametrize("kind", ["bytes", "SentencePiece, own training", "bert, uncased", "text8"])
def test_prompts_are_those_of_sample(codecs, kind):
    tokenizer, outcomes = tokenizer_of(kind), set()
    for text in [*tokenizer_kinds.masked_texts(PROMPTS), "\ud800[MASK]"]:
        try:
            parsed = prompts.parse_text(text, tokenizer, length=LENGTH)
            wanted = list(prompts.complete(parsed, LENGTH))
        except UserError:
            with pytest.raises(ValueError, match="^prompt "):
                text_codec.parse_prompt(codecs[kind], text, LENGTH)
        else:
            assert text_codec.parse_prompt(codecs[kind], text, LENGTH) == wanted
            outcomes.add(len(wanted) == LENGTH)
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    ("kind", "text", "part"),
    [
        ("bytes", "a" * 41, "has 41 tokens or more: must have at most 40"),
        ("bytes", "a" * 40, "must have at least one token to generate"),
        ("bytes", "a [MASK:0]", "'[MASK:0]': must be [MASK], or [MASK:n] with n in 1..999999"),
        ("text8", "to Be[MASK]", "character 3, 'B' (U+0042), must be kept as it is"),
        ("bert, cased", "to [MASK]", "leave it out: the token in place of [MASK] can add a space"),
        ("bytes", "a\ud800", "character 1 is a lone surrogate"),
    ],
)
def test_bad_prompts_are_told_in_one_line(codecs, kind, text, part):
    with pytest.raises(ValueError) as error:
        text_codec.parse_prompt(codecs[kind], text, LENGTH)
    assert part in str(error.value) and "\n" not in str(error.value)


# Without libraries.


def test_kinds_that_need_no_library():
    found = {kind for kind in KINDS if tokenizer_kinds.vocabulary_of(kind)["library"] is None}
    assert found == set(WITHOUT_LIBRARY)


def test_user_defined_symbols_need_the_library():
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(infilling.CORPUS), model_writer=proto, minloglevel=2, num_threads=1,
        model_type="bpe", vocab_size=500, byte_fallback=True, normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, user_defined_symbols=["to be"],
    )  # fmt: skip
    made = vocabulary.content(SentencePiece(proto.getvalue()))
    assert made["library"] == {"package": "sentencepiece", "file": "tokenizer/tokenizer.model"}


def test_fewest_tokens_without_the_package(tmp_path, monkeypatch, capsys):
    codec = text_codec.load(tokenizer_kinds.write("bert, cased", tmp_path / "out"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # to import it is an error
    text = "to be, or not to be"
    ids = codec.encode(text)
    assert codec.decode(ids) == text and codec.encode(text) == ids
    assert len(ids) <= len(tokenizer_of("bert, cased").encode(text))
    (line,) = capsys.readouterr().err.splitlines()
    assert "the package tokenizers is not installed" in line


def test_tokenizer_without_surfaces(capsys):
    ids = dict(vocab_size=5, mask_id=5, bos_id=0, eos_id=1, pad_id=1)
    made = vocabulary.content(types.SimpleNamespace(kind="tokenizers", surfaces=None, **ids))
    codec = text_codec.Codec(json.loads(json.dumps(made)))
    for call in (codec.encode, codec.decode, lambda text: text_codec.parse_prompt(codec, text, 9)):
        with pytest.raises(ValueError, match="needs its own library: use token ids"):
            call("a")
    assert text_codec.show(codec, [[3, 4]], [False]) == "[3, 4]"
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_long_prompt_takes_no_quadratic_time():
    """Pairs merge within chunks: here of one word."""
    codec = text_codec.Codec(tokenizer_kinds.vocabulary_of("SentencePiece, own training"))
    text = "to be or not to be, that is the question\n" * 2000
    assert codec.encode(text) == tokenizer_of("SentencePiece, own training").encode(text)


# As scripts.


def test_folder_needs_the_standard_library_alone(tmp_path):
    folder = tokenizer_kinds.write("SentencePiece, own training", tmp_path / "out")
    shipped = [SHIPPED / name for name in ("text_codec.py", "spelling.py", "options.py")]
    for file in (*shipped, known_text.__file__, mask_spans.__file__):
        shutil.copy(file, folder)
    lines = [
        "import sys, options, text_codec",
        "given = options.parse('texts')",
        "codec = text_codec.load('.')",
        "rows = [text_codec.parse_prompt(codec, text, 9) for text in given.prompts]",
        "rows = [[codec.mask_id if i < 0 else i for i in row] for row in rows]",
        "print(text_codec.show(codec, rows, [True] * len(rows), as_ids=given.ids))",
        "assert not {'numpy', 'sentencepiece', 'esolm_jax'} & set(sys.modules)",
    ]
    (folder / "try.py").write_text("\n".join(lines))
    run = [sys.executable, "-S", "try.py", "to be[MASK]", "é\u2581[MASK:2]"]
    out = subprocess.run(run, cwd=folder, check=True, capture_output=True, text=True)
    first, second, third, fourth = out.stdout.splitlines()
    assert first.startswith("--- text 0 ---") and second == "to be[MASK]"
    assert third.startswith("--- text 1 ---") and fourth == "é\u2581[MASK][MASK]"
    out = subprocess.run([*run, "--ids"], cwd=folder, check=True, capture_output=True, text=True)
    tokenizer = tokenizer_of("SentencePiece, own training")
    rows = [json.loads(line) for line in out.stdout.splitlines()]
    assert rows[0] == [*tokenizer.encode("to be"), tokenizer.mask_id]


def test_options():
    given = options.parse("texts", ["--steps=8", "a", "--top_p", "0.5", "b [MASK]", "--ids"])
    assert given.prompts == ["a", "b [MASK]"] and given.ids and given.length is None
    assert (given.num_texts, given.seed) == (1, 0)
    assert options.settings(given) == {"steps": 8, "top_p": 0.5}


@pytest.mark.parametrize(
    ("arg", "line"),
    [
        ("--steps=-1", "--steps=-1: must be an integer of at least 0"),
        ("--steps=1.5", "--steps=1.5: must be an integer of at least 0"),
        ("--top_p=0", "--top_p=0: must be in (0, 1]"),
        ("--alpha_0=nan", "--alpha_0=nan: must be in [0, 1]"),
        ("--temperature=inf", "--temperature=inf: must be at least 0"),
        ("--seed=4294967296", "--seed=4294967296: must be an integer in [0, 2**32)"),
        ("--step=1", "unrecognized arguments: --step=1"),
    ],
)
def test_bad_options_are_told_in_one_line(capsys, arg, line):
    with pytest.raises(SystemExit) as error:
        options.parse("texts", [arg])
    assert error.value.code == 2 and capsys.readouterr().err == f"error: {line}\n"
