"""Traces as a page and as a picture, and the string of each token that they show."""

import html.parser
import io
import json
import random

import numpy as np
import pytest
import sentencepiece
from matplotlib import pyplot

from esolm_jax.data.tokenizer import Bytes, SentencePiece, train_sentencepiece
from esolm_jax.sampling.trace import GIVEN, NEVER, TEMPLATE, Trace, write_html, write_png

pytestmark = pytest.mark.fast_compile

CORPUS = ["Shall I compare thee to a summer's day?\n  Thou art  more lovely,\tand é.\n"] * 50
HOSTILE = [
    "</script>",
    "<!--<script>",
    "&lt;",
    "\"'`\\",
    "\x00\x1b",
    "\u2028",
    "\ud800",
    "__DATA__",
]


def with_dummy_prefix() -> SentencePiece:
    """A model that strips the first space of a text, and spells nothing in bytes."""
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=proto, vocab_size=29, minloglevel=2
    )
    return SentencePiece(proto.getvalue())


@pytest.fixture(scope="module", params=["bytes", "sentencepiece", "dummy prefix"])
def tokenizer(request):
    if request.param == "bytes":
        return Bytes()
    if request.param == "sentencepiece":
        return train_sentencepiece(CORPUS, 300)
    return with_dummy_prefix()


def test_pieces_join_to_the_decoded_text(tokenizer):
    rng = random.Random(0)
    ordinary = tokenizer.encode("thee 😀👩‍👧 é e\u0301 中文 \u2028 \u2581 day\n")
    for i in range(500):
        ids = [rng.randrange(tokenizer.mask_id + 1) for _ in range(rng.randrange(30))]
        if i % 2:  # characters cut anywhere
            start = rng.randrange(len(ordinary))
            ids[3:3] = ordinary[start : rng.randrange(start, len(ordinary) + 1)]
        pieces = tokenizer.pieces(ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == tokenizer.decode(ids)
    with pytest.raises(ValueError, match="token id -1"):
        tokenizer.pieces([-1])


def test_pieces_stand_in_their_places():
    for tokenizer in (Bytes(), train_sentencepiece(CORPUS, 300)):
        t, space = tokenizer, tokenizer.encode(" \n")
        wide = t.encode("中")  # three bytes
        ids = [t.bos_id, *wide, *wide[:2], *space, t.mask_id, t.eos_id, t.pad_id]
        broken = ["", "\ufffd"] if t.kind == "bytes" else ["\ufffd"] * 2  # each as its decode does
        assert t.pieces(ids) == ["", "", "", "中", *broken, " ", "\n", "[MASK]", "[EOS]", ""]
        assert t.pieces([]) == []
    assert tokenizer.pieces(tokenizer.encode(" t")) == [" t"]  # not SentencePiece's own sign


def trace(batch: int, length: int, pieces=("a", " the", "\n")) -> Trace:
    """Some given, one not generated, the others in random order, half of them one at a time."""
    rng = np.random.default_rng(0)
    revealed = np.stack([rng.permutation(length) for _ in range(batch)])
    is_diffusion = revealed < length // 2
    revealed = np.where(is_diffusion, revealed // 4, revealed)
    revealed[:, 0], revealed[:, -1] = GIVEN, NEVER
    rows = [[pieces[i % len(pieces)] for i in range(length)] for _ in range(batch)]
    return Trace(rows, revealed, is_diffusion, "eso_b, α₀ = 0.5 & </title>")


class Scripts(html.parser.HTMLParser):
    """Collects the content of the page's script elements."""

    def __init__(self, page: str):
        super().__init__()
        self.content, self.inside = [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "script":
            assert not dict(attrs).get("src")
            self.content.append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"

    def handle_data(self, data):
        if self.inside:
            self.content[-1] += data


def test_page_holds_any_token_and_loads_nothing(tmp_path):
    given = trace(3, 16, HOSTILE)
    given.pieces[1] = given.pieces[1][:10]  # a shorter text
    path = tmp_path / "trace.html"
    write_html(given, path)
    page = path.read_text(encoding="utf-8")
    data, script = Scripts(page).content
    assert not set("<>&") & set(data) and data.isascii() and data.isprintable()
    data = json.loads(data)
    assert data["title"] == given.title
    assert [text["pieces"] for text in data["texts"]] == given.pieces
    assert data["texts"][1]["revealed"] == given.revealed_at[1, :10].tolist()
    assert data["texts"][2]["diffusion"] == given.is_diffusion[2].astype(int).tolist()
    assert not any(word in page for word in ("http", "//cdn", "@import", "url("))
    assert not any(word in script for word in ("innerHTML", "fetch(", "eval(", "document.write"))
    assert TEMPLATE.read_text(encoding="utf-8").count("__DATA__") == 1


def test_page_is_small(tmp_path):
    write_html(trace(8, 128), tmp_path / "trace.html")
    assert (tmp_path / "trace.html").stat().st_size < 60_000


@pytest.mark.parametrize("batch", [1, 9])
def test_picture(tmp_path, batch):
    path = tmp_path / "trace.png"
    write_png(trace(batch, 8), path)
    height, width, _ = pyplot.imread(path).shape
    assert 600 < width < 1400 and 300 < height < 900
    assert not pyplot.get_fignums()
