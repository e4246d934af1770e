"""The tokenizers of the published runs, from local files: GPT-2's BPE and BERT's WordPiece.

Needs the package `tokenizers` (pip install -e '.[interop]'). The files are those of the Hugging
Face hub: tokenizer.json, or vocab.json with merges.txt, or vocab.txt. The same vocabulary gives
the same tokenizer with the same fingerprint, from any of these files.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from esolm_jax.data.render import ByTokenizers
from esolm_jax.errors import UserError, brief, is_panic
from esolm_jax.files import regular_file

KINDS = ("gpt2", "bert")
FILE = "tokenizer.json"
_ALLOWED = f"{FILE}, vocab.json with merges.txt in the same folder (GPT-2), or vocab.txt (BERT)"
_NEEDED = {"gpt2": ("<|endoftext|>",), "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")}
_BYTES = 256
_MAX_SIZE = 256 * regular_file.MB  # of a file
_MAX_IDS = 2**31


class WordPieces(ByTokenizers):
    """GPT-2's byte-level BPE (kind "gpt2") or BERT's WordPiece (kind "bert").

    GPT-2 has no mask token: it becomes one past the last id, as in the published checkpoints; its
    <|endoftext|> is BOS, EOS and PAD. BERT's [MASK] is one of its ids; BOS is [CLS], EOS is [SEP].
    Text is never encoded to special tokens: their names are spelled. BERT's tokenizer loses case,
    accents and white space.
    """

    def __init__(self, kind: str, vocab: dict[str, int], merges: list, *, lowercase: bool):
        """Ids by token; merges: pairs of tokens (gpt2). UserError: a token is missing."""
        self.kind = kind
        self._check(vocab)
        self.vocab_size = max(vocab.values()) + 1
        self.mask_id = vocab.get("[MASK]", self.vocab_size)
        if kind == "gpt2":
            self.bos_id = self.eos_id = self.pad_id = vocab["<|endoftext|>"]
        else:
            self.bos_id, self.eos_id, self.pad_id = (
                vocab[name] for name in ("[CLS]", "[SEP]", "[PAD]")
            )
        identity = [kind, sorted(vocab.items(), key=lambda item: item[1]), merges, lowercase]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self._tokenizer = _make(kind, vocab, merges, lowercase)

    def _check(self, vocab: dict[str, int]) -> None:
        if missing := [name for name in _NEEDED[self.kind] if name not in vocab]:
            raise UserError(f"a {self.kind} tokenizer must have {', '.join(missing)}")
        if self.kind == "gpt2" and sum(len(token) == 1 for token in vocab) < _BYTES:
            raise UserError("a gpt2 tokenizer must have a token for each of the 256 bytes")

    def json(self) -> str:
        """The content of tokenizer.json."""
        return self._tokenizer.to_str()

    def save(self, directory: str | Path) -> None:
        Path(directory, FILE).write_text(self.json(), encoding="utf-8")


def _make(kind: str, vocab: dict[str, int], merges: list, lowercase: bool):
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            f"a {kind} tokenizer needs the package tokenizers: pip install -e '.[interop]'"
        ) from error
    if kind == "gpt2":
        model = tokenizers.models.BPE(vocab, merges)
        made = tokenizers.Tokenizer(model)
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        return made
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece()
    return made


def read(path: str | Path) -> WordPieces:
    """The tokenizer in a file or folder.

    Raises:
      UserError: no such files, damaged, or a tokenizer of another kind.
    """
    file = _find(regular_file.expand(path))
    try:
        if file.name == "vocab.txt":
            tokens = regular_file.read_text(file, _MAX_SIZE).split("\n")
            tokens = tokens[:-1] if tokens[-1] == "" else tokens
            parts = "bert", {token: i for i, token in enumerate(tokens)}, [], True
        elif file.name == "vocab.json":
            lines = regular_file.read_text(file.with_name("merges.txt"), _MAX_SIZE).split("\n")
            merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
            parts = "gpt2", regular_file.read_json(file, _MAX_SIZE), merges, False
        else:
            parts = _of_json(regular_file.read_json(file, _MAX_SIZE))
        kind, vocab, merges, lowercase = parts
        merges = _pairs(merges)
        return WordPieces(kind, _ids(vocab), merges, lowercase=lowercase)
    except UserError as error:
        if str(error).startswith((str(file), str(file.with_name("merges.txt")))):
            raise
        raise UserError(f"{file}: {error}") from error
    except BaseException as error:  # `tokenizers` raises bare Exceptions
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise UserError(f"{file}: damaged: {brief(error)}") from error


def _ids(vocab: Any) -> dict[str, int]:
    """UserError unless the ids are distinct."""
    if not isinstance(vocab, dict) or not all(
        type(i) is int and 0 <= i < _MAX_IDS for i in vocab.values()
    ):
        raise UserError("damaged: its vocabulary must be an object of tokens and ids")
    if len(set(vocab.values())) != len(vocab):
        raise UserError("damaged: two of its tokens have the same id")
    return vocab


def _pairs(merges: Any) -> list[tuple[str, str]]:
    """UserError unless each is a pair of tokens."""
    if not isinstance(merges, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        for pair in merges
    ):
        raise UserError("damaged: its merges must be pairs of tokens")
    return [tuple(pair) for pair in merges]


def _find(path: Path) -> Path:
    if not os.path.isdir(path) and regular_file.is_there(path):
        if path.suffix == ".txt":
            return path if path.name != "merges.txt" else path.with_name("vocab.json")
        return path
    for name in (FILE, "vocab.json", "vocab.txt"):
        if regular_file.is_there(path / name):
            return path / name
    raise UserError(f"{path}: holds no tokenizer: {_ALLOWED}")


def _of_json(content: Any) -> tuple[str, dict[str, int], list, bool]:
    """kind, vocabulary, merges and case of a tokenizer.json."""
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise UserError("damaged: it has no model")
    kind = {"BPE": "gpt2", "WordPiece": "bert"}.get(str(model.get("type"))[:80])
    before = json.dumps(content.get("pre_tokenizer"))
    if kind is None or (kind == "gpt2" and "ByteLevel" not in before):
        found = ascii(str(model.get("type"))[:80])[1:-1]
        raise UserError(f"must be a byte-level BPE or WordPiece tokenizer, not {found}")
    vocab = dict(_ids(model.get("vocab")))
    for added in content.get("added_tokens") or []:
        vocab.setdefault(added["content"], added["id"])
    merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
    lowercase = (content.get("normalizer") or {}).get("lowercase", False)
    if not isinstance(lowercase, bool):
        raise UserError("damaged: its normalizer.lowercase must be true or false")
    return kind, vocab, merges, lowercase
