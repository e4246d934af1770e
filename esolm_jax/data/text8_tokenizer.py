"""The tokenizer of text8: 27 characters and 8 special tokens, as in the published runs."""

import re
from pathlib import Path

from esolm_jax.data.render import Decodes
from esolm_jax.data.surfaces import Surfaces

KIND = "text8"
FILE = "tokenizer.text8"
# [RESERVED] has an id, but text cannot spell it.
_SPECIALS = "[CLS]", "[SEP]", "[BOS]", "[EOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]"
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz "
IDS = {token: i for i, token in enumerate((*_SPECIALS, *_CHARACTERS))}
SPELLED = [name for name in _SPECIALS if name != "[RESERVED]"]  # by encode_recognizing
_TOKEN = re.compile("|".join([*map(re.escape, SPELLED), "."]), re.DOTALL)


class Text8(Decodes):
    """Characters, lower-cased; all but a to z and space are [UNK], which decodes to nothing."""

    kind = KIND
    vocab_size = len(IDS)
    mask_id, bos_id, eos_id, pad_id = (IDS[f"[{n}]"] for n in ("MASK", "BOS", "EOS", "PAD"))
    fingerprint = "text8-characters-v1"
    surfaces = Surfaces(
        *[[b""] * len(_SPECIALS) + [character.encode() for character in _CHARACTERS]] * 2,
        [False] * len(_SPECIALS) + [True] * len(_CHARACTERS),
        False,
    )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without specials."""
        return [IDS.get(character.lower(), IDS["[UNK]"]) for character in text]

    def encode_recognizing(self, text: str) -> list[int]:
        """Ids of `text`; special tokens that it spells out become these tokens, as published."""
        unknown = IDS["[UNK]"]
        return [
            IDS.get(token if len(token) > 1 else token.lower(), unknown)
            for token in _TOKEN.findall(text)
        ]

    def save(self, directory: str | Path) -> None:
        Path(directory, FILE).write_text(self.fingerprint + "\n")
