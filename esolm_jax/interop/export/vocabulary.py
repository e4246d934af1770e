"""vocabulary.json of an exported folder: all that shipped code needs to decode token ids, and to
encode prompts (shipped/spelling.py describes the encoders).

    kind, vocab_size, mask_id, bos_id, eos_id, pad_id
    inside              by id, the bytes within a text, as a string of characters below 256; null if
                        decoding is no concatenation: only ids can be shown
    first               {id: bytes at the beginning of a text}, where it is not `inside`, or with
    drops_first_space   `inside` without a space at its beginning
    unspelled           ids that known text is not spelled with
    each_byte           each invalid byte becomes one U+FFFD, not each incomplete character
    encoder             "characters", "gpt2" or "library"
    left                gpt2: by id, the length in bytes of the left part of its merge; else null
    symbols             {bytes: id} for characters with several ids that not the last one spells
    library             {package, file}, or null
"""

import json
import pathlib
import random
from typing import Any

from esolm_jax.data import hub_tokenizer, known_text
from esolm_jax.data.render import ByTokenizers
from esolm_jax.data.surfaces import BYTE_ALPHABET, Surfaces
from esolm_jax.data.tokenizer import MODEL_FILE, SentencePiece, Tokenizer
from esolm_jax.data.wordpieces import WordPieces
from esolm_jax.interop.export.shipped import text_codec
from esolm_jax.interop.hub import tokenizer_files

FILE = "vocabulary.json"
FOLDER = tokenizer_files.OURS  # of the tokenizer's own files, in the exported folder
_PROBES, _PARTS = 100, 12  # random texts to compare the encodings of, and their parts
_ODD = ["\n", "  ", "\t", "é", "e\u0301", "漢字", "🙂", "\u2581", "\x00", "don't", "<0x41>", "10%"]
_LIMIT = 2**20  # tokens of a probe


def content(tokenizer: Tokenizer) -> dict[str, Any]:
    """JSON-able content of vocabulary.json. Its encoder is compared with the tokenizer."""
    roles = ("vocab_size", "mask_id", "bos_id", "eos_id", "pad_id")
    made = {"kind": tokenizer.kind} | {role: getattr(tokenizer, role) for role in roles}
    surfaces = tokenizer.surfaces
    if surfaces is None:
        return made | {"inside": None}
    made |= _surfaces(surfaces) | _encoder(tokenizer)
    if made["library"] is None and not _agrees(made, tokenizer, surfaces):
        made |= _of_library(tokenizer)
    return made


def write(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Writes vocabulary.json to an exported folder, in one line."""
    text = json.dumps(content(tokenizer), ensure_ascii=False, separators=(",", ":"))
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def _surfaces(surfaces: Surfaces) -> dict[str, Any]:
    inside = [data.decode("latin-1") for data in surfaces.inside]
    first = [data.decode("latin-1") for data in surfaces.first]
    exceptions = [
        {str(i): f for i, (f, s) in enumerate(zip(first, inside, strict=True)) if f != rule(s)}
        for rule in (str, lambda surface: surface.removeprefix(" "))
    ]
    drops = len(exceptions[1]) < len(exceptions[0])
    return {
        "inside": inside,
        "drops_first_space": drops,
        "first": exceptions[drops],
        "unspelled": [i for i, spells in enumerate(surfaces.spells) if not spells],
        "each_byte": surfaces.each_byte,
    }


def _encoder(tokenizer: Tokenizer) -> dict[str, Any]:
    if isinstance(tokenizer, SentencePiece):
        symbols = _symbols(tokenizer.proto)
        made = {"encoder": "characters", "left": None, "symbols": symbols, "library": None}
        return _of_library(tokenizer) if symbols is None else made
    if not isinstance(tokenizer, ByTokenizers):
        return {"encoder": "characters", "left": None, "symbols": {}, "library": None}
    is_ours = isinstance(tokenizer, WordPieces)
    left = _gpt2_merges(json.loads(tokenizer.json() if is_ours else tokenizer.content))
    if left is None:
        return _of_library(tokenizer)
    left += [0] * (tokenizer.vocab_size - len(left))
    return {"encoder": "gpt2", "left": left, "symbols": {}, "library": None}


def _of_library(tokenizer: Tokenizer) -> dict[str, Any]:
    package, file = "tokenizers", hub_tokenizer.FILE
    if isinstance(tokenizer, SentencePiece):
        package, file = "sentencepiece", MODEL_FILE
    library = {"package": package, "file": f"{FOLDER}/{file}"}
    return {"encoder": "library", "left": None, "symbols": {}, "library": library}


def _symbols(proto: bytes) -> dict[str, int] | None:
    """`symbols` of a SentencePiece model: ASCII characters whose byte pieces have higher
    ids. None unless the model is plain BPE with byte fallback, and of two
    pieces that merge the one of the lower id has the higher score."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    ids = range(model.vocab_size())
    if not tokenizer_files.is_plain_bpe(model) or any(map(model.is_unused, ids)):
        return None
    others = model.is_control, model.is_unknown, model.is_byte
    pieces = {model.id_to_piece(i): i for i in ids if not any(other(i) for other in others)}
    merged = [model.get_score(i) for piece, i in pieces.items() if len(piece) > 1]
    if any(a <= b for a, b in zip(merged, merged[1:], strict=False)):
        return None
    last_byte = max(i for i in ids if model.is_byte(i))
    return {piece: i for piece, i in pieces.items() if piece.isascii() and i < last_byte}


_GPT2 = {  # of the model in tokenizer.json
    "type": ("BPE",),
    "dropout": (None,),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}


def _gpt2_merges(content: dict) -> list[int] | None:
    """By id, the length in bytes of the left part of its merge, 0 without one; None unless
    tokenizer.json is a byte-level BPE like GPT-2's, with merges in the order of ids."""
    model, before = content["model"], content.get("pre_tokenizer") or {}
    added = content.get("added_tokens") or []
    is_gpt2 = all(model.get(name) in allowed for name, allowed in _GPT2.items())
    is_gpt2 &= before.get("type") == "ByteLevel" and before.get("use_regex", True)
    is_gpt2 &= not before.get("add_prefix_space") and content.get("normalizer") is None
    if not is_gpt2 or not all(token["special"] for token in added):
        return None
    vocab, last = model["vocab"], -1
    left = [0] * (max(vocab.values()) + 1)
    for merge in model["merges"]:
        a, b = merge.split(" ") if isinstance(merge, str) else merge
        i = vocab.get(a + b, -1)
        if i <= last or not set(a + b) <= BYTE_ALPHABET.keys():
            return None
        left[i], last = len(a), i
    return left


def _agrees(made: dict, tokenizer: Tokenizer, surfaces: Surfaces) -> bool:
    """Whether shipped code encodes random texts as known_text does."""
    codec, rng = text_codec.Codec(made), random.Random(0)
    spelled = [s for s, ok in zip(surfaces.inside, surfaces.spells, strict=True) if s and ok]
    for _ in range(_PROBES):
        parts = [p.decode(errors="ignore") for p in rng.choices(spelled, k=_PARTS)]
        text = "".join(rng.sample([*parts, *rng.choices(_ODD, k=3)], k=_PARTS))
        begins = rng.random() < 0.5
        try:
            wanted = known_text.encode(tokenizer, text, begins=begins, limit=_LIMIT)
        except known_text.NotKept:
            continue
        if codec.encode(text, begins=begins) != wanted:
            return False
    return True
