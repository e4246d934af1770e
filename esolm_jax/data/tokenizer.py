"""Text <-> token ids: SentencePiece, plain UTF-8 bytes, the tokenizers of the published runs
(GPT-2's, BERT's, text8's characters), or that of a pretrained model.

All tokenizers have the same attributes: kind, vocab_size (how many ids they have, specials
included), mask_id (one of these, or one past them: == vocab_size), bos_id, eos_id, pad_id, eot_id
(None unless there is one), and fingerprint. All have encode, decode, pieces and save. Decoding
drops BOS and PAD, and shows EOS as '[EOS]' and the mask as '[MASK]'.
"""

import functools
import hashlib
import io
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from esolm_jax.data import hub_tokenizer, surfaces, text8_tokenizer, wordpieces
from esolm_jax.data.hub_tokenizer import HubTokenizer
from esolm_jax.data.render import Decodes
from esolm_jax.data.surfaces import Surfaces
from esolm_jax.data.text8_tokenizer import Text8
from esolm_jax.data.wordpieces import WordPieces
from esolm_jax.errors import UserError, brief, nearest
from esolm_jax.files import regular_file

KINDS = ("sentencepiece", "bytes", *wordpieces.KINDS, hub_tokenizer.KIND, text8_tokenizer.KIND)
MODEL_FILE = "tokenizer.model"
BYTES_FILE = "tokenizer.bytes"
_MAX_MODEL = 256 * regular_file.MB
# The trainer holds its text, so it sees at most SAMPLE_LINES lines of at most LINE characters.
SAMPLE_LINES = 200_000
LINE = 256
SPACE = "\u2581"  # SentencePiece's symbol for a space


class Bytes(Decodes):
    """UTF-8 bytes: ids 0..255, then BOS, EOS, PAD. Lossless, and needs no training."""

    kind = "bytes"
    vocab_size = mask_id = 259
    bos_id, eos_id, pad_id = 256, 257, 258
    fingerprint = "utf-8-bytes-v1"
    surfaces = Surfaces.of_bytes(specials=3)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without specials."""
        return list(text.encode("utf-8"))

    def save(self, directory: str | Path) -> None:
        Path(directory, BYTES_FILE).write_text(self.fingerprint + "\n")


class SentencePiece(Decodes):
    """A SentencePiece model; its own training makes it lossless on any text."""

    kind = "sentencepiece"

    def __init__(self, proto: bytes, where: str = MODEL_FILE):
        """`proto`: the bytes of a .model file. Raises UserError if unusable; `where` names it."""
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise UserError(f"{where}: not a SentencePiece model: {brief(error)}") from error
        self.proto = proto
        self.fingerprint = hashlib.sha256(proto).hexdigest()
        self.vocab_size = self.mask_id = self._model.vocab_size()
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        for name, value in (("BOS", self.bos_id), ("EOS", self.eos_id)):
            if value < 0:
                raise UserError(f"{where}: must have a {name} token")
        # Padding never reaches the loss, so EOS can serve as PAD.
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_id
        # U+2581 itself would decode to a space, so it is spelled in bytes.
        self._space = [self._model.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode()]
        self._has_bytes = self._model.unk_id() not in self._space

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without specials."""
        if not self._has_bytes or SPACE not in text:
            return self._model.encode(text)
        first, *rest = text.split(SPACE)
        ids = self._model.encode(first)
        for part in rest:
            ids += self._space + self._model.encode(part)
        return ids

    @functools.cached_property
    def surfaces(self) -> Surfaces | None:
        return surfaces.of_sentencepiece(self._model)

    def _library_text(self, run: list[int]) -> str:
        return self._model.decode(run)

    def save(self, directory: str | Path) -> None:
        Path(directory, MODEL_FILE).write_bytes(self.proto)


Tokenizer = Bytes | SentencePiece | WordPieces | HubTokenizer | Text8
_WITHOUT_FILES = {kind.kind: kind for kind in (Bytes, Text8)}
_PUBLISHED = {  # where the files of the published runs' tokenizers are
    "gpt2": "tokenizer.json, or vocab.json and merges.txt, of huggingface.co/openai-community/gpt2",
    "bert": "tokenizer.json, or vocab.txt, of huggingface.co/google-bert/bert-base-uncased",
    hub_tokenizer.KIND: "the folder that `convert` wrote",
}


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer that save() wrote to `directory`. Raises UserError if there is none."""
    model = Path(directory, MODEL_FILE)
    if model.is_file():
        return SentencePiece(regular_file.read_bytes(model, _MAX_MODEL), str(model))
    if Path(directory, BYTES_FILE).is_file():
        return Bytes()
    if Path(directory, text8_tokenizer.FILE).is_file():
        return Text8()
    if hub_tokenizer.is_here(directory):
        return hub_tokenizer.read(directory)
    if Path(directory, wordpieces.FILE).is_file():
        return wordpieces.read(directory)
    files = f"{MODEL_FILE}, {BYTES_FILE} or {wordpieces.FILE}"
    raise UserError(f"{directory}: holds no tokenizer ({files})")


def read_tokenizer(given: str | Path) -> Tokenizer:
    """The tokenizer in a file or folder of any kind: the files of save(), a SentencePiece .model,
    or the files of wordpieces.read; "bytes" and "text8" need no files. Raises UserError."""
    path = regular_file.expand(given)
    if given in _WITHOUT_FILES:
        return _WITHOUT_FILES[str(given)]()
    names = (MODEL_FILE, BYTES_FILE, text8_tokenizer.FILE)
    saved = any((path / name).is_file() for name in names)
    if saved or hub_tokenizer.is_here(path):
        return load_tokenizer(path)
    if path.suffix == ".model" and regular_file.is_there(path) and not path.is_dir():
        return SentencePiece(regular_file.read_bytes(path, _MAX_MODEL), str(path))
    return wordpieces.read(path)


def from_config(config: Any, train_documents: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer of config.data.

    A SentencePiece model that config.data.tokenizer_path names is used unchanged; else one of
    config.data.vocab_size tokens is trained, and only then `train_documents` is called.
    Raises UserError.
    """
    data = config.data
    if data.tokenizer in _WITHOUT_FILES:
        return _WITHOUT_FILES[data.tokenizer]()
    if data.tokenizer in (*wordpieces.KINDS, hub_tokenizer.KIND):
        return _published(data)
    if data.tokenizer != "sentencepiece":
        raise UserError(
            f"config.data.tokenizer={data.tokenizer!r}: must be one of {', '.join(KINDS)}"
            f"{nearest(data.tokenizer, KINDS)}"
        )
    if not data.tokenizer_path:
        return train_sentencepiece(train_documents(), data.vocab_size)
    where = f"config.data.tokenizer_path={data.tokenizer_path!r}"
    path = regular_file.expand(data.tokenizer_path)
    return SentencePiece(regular_file.read_bytes(path, _MAX_MODEL, where), where)


def trains(config: Any) -> bool:
    """Whether a tokenizer is trained on the train split."""
    return config.data.tokenizer == "sentencepiece" and not config.data.tokenizer_path


def _published(data: Any) -> WordPieces | HubTokenizer:
    where, files = f"config.data.tokenizer_path={data.tokenizer_path!r}", _PUBLISHED[data.tokenizer]
    if not data.tokenizer_path:
        raise UserError(f"{where}: must name the files of the {data.tokenizer} tokenizer: {files}")
    if data.tokenizer == hub_tokenizer.KIND:
        return hub_tokenizer.read(data.tokenizer_path)
    try:
        tokenizer = wordpieces.read(data.tokenizer_path)
    except UserError as error:
        raise UserError(f"{where}: {error}; get {files}") from error
    if tokenizer.kind != data.tokenizer:
        raise UserError(f"{where}: must hold a {data.tokenizer} tokenizer, not {tokenizer.kind}")
    if data.tokenizer_ids not in (0, tokenizer.vocab_size):
        raise UserError(
            f"{where}: must have config.data.tokenizer_ids={data.tokenizer_ids} ids, not "
            f"{tokenizer.vocab_size}: get {files}"
        )
    return tokenizer


def train_sentencepiece(documents: Iterable[str], vocab_size: int) -> SentencePiece:
    """Trains a lossless byte-fallback BPE model; equal documents give equal models.

    Raises UserError if SentencePiece refuses `vocab_size`.
    """
    proto = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_sample(_lines(documents))),
            model_writer=proto,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,  # a character outside the vocabulary is spelled in bytes
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=1,  # is written in the model, so it must not depend on the machine
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).rsplit("] ", 1)[-1]
        raise UserError(
            f"config.data.vocab_size={vocab_size}: SentencePiece refuses it: {reason}"
        ) from error
    return SentencePiece(proto.getvalue())


def _lines(documents: Iterable[str]) -> Iterator[str]:
    for text in documents:
        for line in text.replace(SPACE, "").split("\n"):
            for start in range(0, len(line), LINE):
                yield line[start : start + LINE]


def _sample(lines: Iterable[str]) -> list[str]:
    """An even sample of the lines (reservoir), the same on every run."""
    rng = random.Random(0)
    kept: list[str] = []
    for i, line in enumerate(lines):
        if i < SAMPLE_LINES:
            kept.append(line)
        elif (place := rng.randrange(i + 1)) < SAMPLE_LINES:
            kept[place] = line
    return kept
