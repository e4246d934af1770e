"""The judge of generative perplexity: a pretrained autoregressive model that scores tokens."""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esolm_jax.data.hub_tokenizer import HubTokenizer
from esolm_jax.data.wordpieces import WordPieces
from esolm_jax.errors import UserError
from esolm_jax.family.labels import Layout, Tokens
from esolm_jax.interop.hub import in_memory
from esolm_jax.model import lm_head
from esolm_jax.model import transformer as model_lib
from esolm_jax.model.model_config import ModelConfig

_LOGITS_AT_ONCE = 1024  # tokens whose logits are in memory together
_SHORTEST, _GROWTH = 256, 4  # lengths of a forward pass: 256, 1024, 4096, …


class Judge:
    """A GPT-2, Llama or Qwen of a folder of the Hugging Face hub, in float32 on one device."""

    def __init__(self, folder: str | Path, *, rows: int = 8):
        """Reads the folder.

        Args:
          folder: config.json, *.safetensors and the tokenizer's files.
          rows: rows of one forward pass. Scores do not depend on it.

        Raises:
          UserError: an unsupported architecture, or missing or damaged files.
        """
        found = in_memory.read(str(folder), jax.default_backend())
        if not isinstance(found.tokenizer, WordPieces | HubTokenizer):
            raise UserError(
                f"{folder}: holds a {found.tokenizer.kind} tokenizer; a judge needs tokenizer.json"
            )
        specials = ("<|endoftext|>",) if isinstance(found.tokenizer, WordPieces) else ()
        self._library = found.tokenizer.recognizing(specials)
        self._model, self._rows = found.model, rows
        self._params = jax.device_put(found.params)
        self._mask_id = found.tokenizer.mask_id
        self.eos_id: int = found.tokenizer.eos_id
        self.vocab_size: int = found.tokenizer.vocab_size

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text with the special tokens that the judge's own tokenizer adds (GPT-2:
        none). Special tokens that a text spells out become these tokens."""
        return [encoding.ids for encoding in self._library.encode_batch(texts)]

    def score(self, ids: np.ndarray, scored: np.ndarray) -> np.ndarray:
        """−log p of tokens, each given those before it in its row, in nats.

        Rows are cut behind their last scored token and padded to one of few lengths, and rows
        without a scored token are not run; few programs are compiled, independent of T.

        Args:
          ids: int [n, T]. scored: bool [n, T]; the first column cannot be scored.

        Returns:
          float32 [n, T], 0 at tokens that are not scored.

        Raises:
          UserError: T is more than the judge's number of positions, or an id is out of range.
        """
        self._check(ids)
        nll = np.zeros(ids.shape, np.float32)
        last = ids.shape[1] - np.argmax(scored[:, ::-1], axis=1)
        ends = np.where(scored.any(axis=1), last, 0)
        shortest = 0
        for length in self._lengths(ids.shape[1]):
            (chosen,) = np.nonzero((ends > shortest) & (ends <= length))
            for start in range(0, len(chosen), self._rows):
                rows = chosen[start : start + self._rows]
                end = min(length, ids.shape[1])
                nll[rows, :end] = self._score_rows(ids[rows, :end], scored[rows, :end], length)
            shortest = length
        return nll

    def _lengths(self, width: int) -> Iterator[int]:
        """Lengths of forward passes, up to the first that holds `width` tokens."""
        length, longest = _SHORTEST, self._model.max_positions or math.inf
        while length < min(width, longest):
            yield length
            length *= _GROWTH
        yield int(min(length, longest))

    def _score_rows(self, ids: np.ndarray, scored: np.ndarray, length: int) -> np.ndarray:
        """`score` of at most self._rows rows of at most `length` tokens, by one forward pass."""
        n, width = ids.shape
        token = np.full((self._rows, length), self.eos_id, np.int32)
        weight = np.zeros(token.shape, np.float32)
        token[:n, :width], weight[:n, :width] = ids, scored
        nll = _nll(self._params, token, weight, model=self._model, mask_id=self._mask_id)
        return np.asarray(nll)[:n, :width]

    def _check(self, ids: np.ndarray) -> None:
        longest = self._model.max_positions
        if longest and ids.shape[1] > longest:
            raise UserError(
                f"context_length={ids.shape[1]}: must be at most {longest}, the judge's number of "
                "positions"
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise UserError(f"texts: token id {wrong}: must be below the judge's {self.vocab_size}")


@functools.partial(jax.jit, static_argnames=("model", "mask_id"))
def _nll(
    params: dict, token_BT: Any, weight_BT: Any, *, model: ModelConfig, mask_id: int
) -> jax.Array:
    """float32 [B, T]: −log p of tokens with a weight, 0 elsewhere; no token reads a later one."""
    index = jnp.broadcast_to(jnp.arange(token_BT.shape[1], dtype=jnp.int32), token_BT.shape)
    layout = Layout(token_BT.shape[1])
    tokens = Tokens(token_BT, index, index, jnp.ones(token_BT.shape, bool), layout)
    head = lm_head.Head.of(model, mask_id, chunk=_LOGITS_AT_ONCE)
    with jax.default_matmul_precision("highest"):
        h_BTD = model_lib.bind(model)(params, tokens, head=False)
        (found,) = lm_head.nll(
            head, (h_BTD[:, :-1],), params["logits"], (token_BT[:, 1:],), (weight_BT[:, 1:],)
        )
    return jnp.pad(found, ((0, 0), (1, 0)))
