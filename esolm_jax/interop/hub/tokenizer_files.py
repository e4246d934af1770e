"""Our tokenizers as files that AutoTokenizer of `transformers` reads: tokenizer.json and
tokenizer_config.json.

Text → ids is ours, without BOS and EOS, except that the names of special tokens are recognized in
text. [MASK] is a token, so that a prompt can have one.
"""

import json
from typing import Any

from esolm_jax import results
from esolm_jax.data.hub_tokenizer import OF_MODEL, HubTokenizer
from esolm_jax.data.surfaces import BYTE_ALPHABET
from esolm_jax.data.text8_tokenizer import IDS, SPELLED, Text8
from esolm_jax.data.tokenizer import SPACE, Bytes, SentencePiece, Tokenizer
from esolm_jax.data.wordpieces import WordPieces

OURS = "tokenizer"  # the folder of the exact files of our tokenizer
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
MASK = "[MASK]"
_ROLES = ("bos", "eos", "pad")
_BYTE_NAMES = {256: "<|bos|>", 257: "<|eos|>", 258: "<|pad|>"}


def files(tokenizer: Tokenizer, *, with_mask: bool) -> dict[str, bytes]:
    """The files by name; {} if `transformers` cannot have this tokenizer.

    Args:
      with_mask: add [MASK] and leave out BOS and EOS around texts; else the files of a pretrained
        model are unchanged.
    """
    if isinstance(tokenizer, HubTokenizer) and not with_mask:
        kept = {n: c for n, c in tokenizer.companions.items() if n not in OF_MODEL}
        content = json.loads(tokenizer.content)
        made = {FILE: tokenizer.content, CONFIG: _config(tokenizer, _names(content), {})}
        return made | kept
    content = _content(tokenizer)
    if content is None:
        return {}
    settings: dict[str, Any] = {}
    if isinstance(tokenizer, HubTokenizer):
        settings = json.loads(tokenizer.companions.get(CONFIG, b"{}"))
    if with_mask:
        content["post_processor"] = None
        if mask := _add_mask(content, tokenizer.mask_id):
            settings["mask_token"] = mask
    made = {
        FILE: results.dumps(content, ensure_ascii=False).encode(),
        CONFIG: _config(tokenizer, _names(content), settings),
    }
    if isinstance(tokenizer, HubTokenizer):
        made |= {n: c for n, c in tokenizer.companions.items() if n.startswith("chat_template")}
    return made


def _content(tokenizer: Tokenizer) -> dict | None:
    """tokenizer.json, with the special tokens named."""
    if isinstance(tokenizer, HubTokenizer):
        return json.loads(tokenizer.content)
    if isinstance(tokenizer, Bytes):
        return _of_bytes()
    if isinstance(tokenizer, SentencePiece):
        return _of_sentencepiece(tokenizer.proto)
    if isinstance(tokenizer, Text8):
        return _of_text8()
    assert isinstance(tokenizer, WordPieces)
    content = json.loads(tokenizer.json())
    names = _names(content)
    for i in sorted({tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}):
        _add_special(content, i, names[i])
    return content


def _config(tokenizer: Tokenizer, names: dict[int, str], settings: dict) -> bytes:
    """tokenizer_config.json: `settings`, and the special tokens that they do not name."""
    ids = {role: getattr(tokenizer, f"{role}_id") for role in _ROLES}
    ours = {f"{role}_token": names[i] for role, i in ids.items() if i in names}
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "backend": "tokenizers"}
    made = {"clean_up_tokenization_spaces": False} | ours | settings | fixed
    for stale in ("added_tokens_decoder", "auto_map", "add_bos_token", "add_eos_token"):
        made.pop(stale, None)
    return results.dumps(made, indent=2, ensure_ascii=False).encode()


def _names(content: dict) -> dict[int, str]:
    """The content of tokens by id."""
    vocab = content["model"].get("vocab", {})
    if isinstance(vocab, dict):
        names = {i: token for token, i in vocab.items()}
    else:
        names = {i: token for i, (token, _) in enumerate(vocab)}
    return names | {entry["id"]: entry["content"] for entry in content["added_tokens"]}


def _add_special(content: dict, i: int, name: str) -> None:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    others = [entry for entry in content["added_tokens"] if entry["id"] != i]
    entry = {"id": i, "content": name, **flags, "special": True}
    content["added_tokens"] = sorted([*others, entry], key=lambda entry: entry["id"])


def _add_mask(content: dict, mask_id: int) -> str | None:
    """Adds the mask token, if it has none. Returns its name; None: the tokenizer cannot have a
    token with this id."""
    vocab, names = content["model"].get("vocab"), _names(content)
    name = names.get(mask_id, MASK)
    if mask_id not in names and mask_id != max(names) + 1:  # a padded vocabulary: ids are skipped
        if not isinstance(vocab, dict):
            return None
        vocab[name] = mask_id
    _add_special(content, mask_id, name)
    return name


def _tokenizer_json(model: dict, **parts: Any) -> dict:
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer"))
    made = {"version": "1.0", **empty, "added_tokens": [], "post_processor": None}
    return made | parts | {"model": bpe | model}


def _of_bytes() -> dict:
    """Each byte is a token without merges."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level["use_regex"] = False
    vocab = dict(BYTE_ALPHABET)
    content = _tokenizer_json({"vocab": vocab, "merges": []}, pre_tokenizer=level, decoder=level)
    for i, name in _BYTE_NAMES.items():
        _add_special(content, i, name)
    return content


def _of_text8() -> dict:
    """Characters, lower-cased. Recognizes the names that Text8.encode_recognizing does."""
    # The only character whose lower case has two characters: two unknown tokens in place of one.
    dotted = {"type": "Replace", "pattern": {"String": "İ"}, "content": "?"}
    normalizer = {"type": "Sequence", "normalizers": [dotted, {"type": "Lowercase"}]}
    content = _tokenizer_json(
        {"vocab": dict(IDS), "merges": [], "unk_token": "[UNK]"},
        normalizer=normalizer,
        decoder={"type": "Fuse"},
    )
    for name in SPELLED:
        _add_special(content, IDS[name], name)
    return content


def is_plain_bpe(model: Any) -> bool:
    """Whether a SentencePiece model is a byte-fallback BPE model as our training makes it."""
    size = model.vocab_size()
    # Merges of BPE have the scores 0, −1, …; the first pieces behind the bytes are user-defined.
    scores = [model.get_score(i) for i in range(size)]
    is_bpe = all(score <= 0 and score == int(score) for score in scores)
    probe = " Ａ  ﬁ\té "
    is_plain = model.normalize(probe).replace(SPACE, " ") == probe
    return is_bpe and is_plain and any(map(model.is_byte, range(size)))


def _of_sentencepiece(proto: bytes) -> dict | None:
    """None unless it is a model as our training makes it."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=proto)
    if not is_plain_bpe(model):
        return None
    size = model.vocab_size()
    pieces = [model.id_to_piece(i) for i in range(size)]
    scores = [model.get_score(i) for i in range(size)]
    normal = [
        i
        for i in range(size)
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    spaces = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    decoders = [*spaces, {"type": "ByteFallback"}, {"type": "Fuse"}]
    content = _tokenizer_json(
        {
            "vocab": vocab,
            "merges": _merges({pieces[i]: scores[i] for i in normal}),
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": pieces[model.unk_id()],
        },
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        decoder={"type": "Sequence", "decoders": decoders},
    )
    for i in range(size):
        if model.is_control(i) or model.is_unknown(i):
            _add_special(content, i, pieces[i])
    return content


def _merges(scores: dict[str, float]) -> list[list[str]]:
    """The pairs that spell a piece, those of the best piece first."""
    pairs = []
    for piece, score in scores.items():
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs += [(score, pair) for pair in cuts if all(part in scores for part in pair)]
    return [list(pair) for _, pair in sorted(pairs, key=lambda item: -item[0])]
