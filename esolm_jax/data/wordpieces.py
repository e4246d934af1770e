"""The tokenizers of the published runs, from local files: GPT-2's BPE and BERT's WordPiece.

Needs the package `tokenizers` (pip install -e '.[interop]'). The files are those of the Hugging
Face hub: tokenizer.json, or vocab.json beside merges.txt, or vocab.txt. However they are given, the
same vocabulary makes the same tokenizer, with the same fingerprint.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from esolm_jax.data.render import ByTokenizers
from esolm_jax.errors import UserError

KINDS = ("gpt2", "bert")
FILE = "tokenizer.json"
_ALLOWED = f"{FILE}, vocab.json with merges.txt beside it (GPT-2), or vocab.txt (BERT)"
_NEEDED = {"gpt2": ("<|endoftext|>",), "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")}
_BYTES = 256


class WordPieces(ByTokenizers):
    """GPT-2's byte-level BPE (kind "gpt2") or BERT's WordPiece (kind "bert").

    GPT-2 has no mask token: it becomes one past the last id, as in the published checkpoints; its
    <|endoftext|> is BOS, EOS and PAD. BERT's [MASK] is one of its ids; BOS is [CLS], EOS is [SEP].
    Special tokens are never found in text: there, they are spelled like any other word. BERT's is
    lossy: case, accents and white space are gone.
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
            raise UserError(f"a {self.kind} tokenizer without {', '.join(missing)}")
        if self.kind == "gpt2" and sum(len(token) == 1 for token in vocab) < _BYTES:
            raise UserError("a gpt2 tokenizer that has not all 256 bytes")

    def save(self, directory: str | Path) -> None:
        Path(directory, FILE).write_text(self._tokenizer.to_str(), encoding="utf-8")


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
      UserError: nothing of the kind there, damaged, or a tokenizer of another kind.
    """
    file = _find(Path(path).expanduser())
    try:
        if file.name == "vocab.txt":
            tokens = file.read_text("utf-8").split("\n")
            tokens = tokens[:-1] if tokens[-1] == "" else tokens
            parts = "bert", {token: i for i, token in enumerate(tokens)}, [], True
        elif file.name == "vocab.json":
            lines = file.with_name("merges.txt").read_text("utf-8").split("\n")
            merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
            parts = "gpt2", json.loads(file.read_text("utf-8")), merges, False
        else:
            parts = _of_json(json.loads(file.read_text("utf-8")))
        kind, vocab, merges, lowercase = parts
        merges = [tuple(merge) for merge in merges]
        return WordPieces(kind, vocab, merges, lowercase=lowercase)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise UserError(f"{file}: damaged: {type(error).__name__}: {error}") from error


def _find(path: Path) -> Path:
    if path.is_file():
        if path.suffix == ".txt":
            return path if path.name != "merges.txt" else path.with_name("vocab.json")
        return path
    for name in (FILE, "vocab.json", "vocab.txt"):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path}: holds no tokenizer: {_ALLOWED}")


def _of_json(content: Any) -> tuple[str, dict[str, int], list, bool]:
    """kind, vocabulary, merges and case of a tokenizer.json."""
    model, before = content["model"], json.dumps(content.get("pre_tokenizer"))
    kind = {"BPE": "gpt2", "WordPiece": "bert"}.get(model.get("type"))
    if kind is None or (kind == "gpt2" and "ByteLevel" not in before):
        raise UserError(f"a {model.get('type')} tokenizer; allowed: byte-level BPE, WordPiece")
    vocab = dict(model["vocab"])
    for added in content.get("added_tokens") or []:
        vocab.setdefault(added["content"], added["id"])
    merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
    lowercase = bool((content.get("normalizer") or {}).get("lowercase", False))
    return kind, vocab, merges, lowercase
