"""The tokenizer of a pretrained model, unchanged: a tokenizer.json of any kind.

Needs the package `tokenizers` (pip install -e '.[interop]'). tokenizer.json lacks the ids
of BOS, EOS and PAD and the size of the model's vocabulary; ids.json in the same folder has them.
The other files of the model's folder (configuration, chat template, …) are kept in the folder hub/,
so that `convert` and `export` can write them back.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from esolm_jax.data.render import ByTokenizers
from esolm_jax.errors import UserError, brief, is_panic
from esolm_jax.files import regular_file

KIND = "tokenizers"
FILE, IDS_FILE = "tokenizer.json", "ids.json"
MAX_SIZE = 256 * regular_file.MB  # of a tokenizer.json; the largest ones have 35
_IDS = ("vocab_size", "bos", "eos", "pad")
COMPANIONS_FOLDER = "hub"
OF_MODEL = ("config.json", "generation_config.json")
COMPANIONS = (
    *OF_MODEL,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "USE_POLICY.md",
)
_MAX_COMPANION = 64 * regular_file.MB
_EOT = "<|eot_id|>"  # of LLaDA and Llama 3


class HubTokenizer(ByTokenizers):
    """A tokenizer.json, for a model with `vocab_size` ids; the mask is one of them or one past
    them.

    The model may have more ids than the tokenizer has tokens, because its embedding is padded;
    these ids decode to nothing. Text is never encoded to special tokens: their names are spelled.
    """

    kind = KIND

    def __init__(
        self,
        content: bytes,
        ids: dict[str, int],
        where: str = FILE,
        companions: Mapping[str, bytes] | None = None,
    ):
        """Args: content: of tokenizer.json. ids: vocab_size, bos, eos, pad and, if the mask is one
        of the ids, mask. where: names it in errors. companions: other files of the model's folder,
        by name. Raises UserError: damaged, or it does not fit the ids."""
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"{where}: needs the package tokenizers: pip install -e '.[interop]'"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except BaseException as error:  # `tokenizers` raises bare Exceptions
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            raise UserError(f"{where}: damaged: {brief(error)}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.content, self.ids = content, {name: ids[name] for name in _names(ids)}
        self.companions = dict(companions or {})
        self.vocab_size = ids["vocab_size"]
        self.mask_id = ids.get("mask", self.vocab_size)
        self.bos_id, self.eos_id, self.pad_id = ids["bos"], ids["eos"], ids["pad"]
        self._check(where)
        self.eot_id = self._tokenizer.token_to_id(_EOT)
        identity = content + json.dumps(self.ids).encode()
        self.fingerprint = hashlib.sha256(identity).hexdigest()

    def _check(self, where: str) -> None:
        size = self.vocab_size
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocab:
            raise UserError(f"{where}: damaged: it has no tokens")
        token, highest = max(vocab.items(), key=lambda item: item[1])
        if highest >= size:
            raise UserError(
                f"{where}: its token {ascii(token)[:80]} has id {highest}, but the model has only "
                f"{size} ids: not the tokenizer of this model"
            )
        for name in _names(self.ids)[1:]:
            if not 0 <= self.ids[name] < size:
                raise UserError(
                    f"{where}: the {name} token has id {self.ids[name]}; must be below {size}"
                )

    def save(self, directory: str | Path) -> None:
        Path(directory, FILE).write_bytes(self.content)
        Path(directory, IDS_FILE).write_text(json.dumps(self.ids) + "\n")
        for name, companion in self.companions.items():
            folder = Path(directory, COMPANIONS_FOLDER)
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(companion)


def read_companions(directory: str | Path, names: tuple[str, ...] = COMPANIONS) -> dict[str, bytes]:
    """The files of these names in a folder. UserError: one is no regular file, or too large."""
    paths = {name: Path(directory, name) for name in names}
    return {
        name: regular_file.read_bytes(path, _MAX_COMPANION)
        for name, path in paths.items()
        if regular_file.is_there(path)
    }


def _names(ids: dict) -> tuple[str, ...]:
    """The ids that a tokenizer has: without `mask` if the mask is one past the vocabulary."""
    return (*_IDS, "mask") if "mask" in ids else _IDS


def is_here(directory: str | Path) -> bool:
    """Whether `directory` holds a tokenizer of save()."""
    return all(regular_file.is_there(Path(directory, name)) for name in (FILE, IDS_FILE))


def read(directory: str | Path) -> HubTokenizer:
    """The tokenizer that save() wrote to a folder. UserError: missing or damaged."""
    path = Path(directory).expanduser()
    if not is_here(path):
        raise UserError(
            f"{path}: must hold a tokenizer written by `convert` ({FILE} and {IDS_FILE})"
        )
    ids = regular_file.read_json(path / IDS_FILE, regular_file.MB)
    if not isinstance(ids, dict) or not all(type(ids.get(name)) is int for name in _names(ids)):
        raise UserError(f"{path / IDS_FILE}: damaged: must be an object of {', '.join(_IDS)}")
    content = regular_file.read_bytes(path / FILE, MAX_SIZE)
    companions = read_companions(path / COMPANIONS_FOLDER)
    return HubTokenizer(content, ids, str(path / FILE), companions)
